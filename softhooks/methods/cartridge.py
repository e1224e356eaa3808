"""Cartridges: a document's keys and values, far fewer than its tokens, trained to answer as if it were there."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from softhooks.encoder import PromptEncoder
from softhooks.errors import OptionError, PromptMismatchError, PromptTooLongError
from softhooks.formats.stored import StoredPrompt
from softhooks.methods.from_prompt import Handle, read_checked
from softhooks.methods.text_prefix import ReadPrefix, ids_of, opening

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure
    from softhooks.objectives.base import Objective


_JOINED = (
    "{count} cartridges were joined that were not trained together. Measurements (arXiv:2606.04557) find that such a prompt may "
    "answer no better than chance. Train it together (`trainable=True`), or use one cartridge at a time, and check its answers."
)


class CartridgeEncoder(PromptEncoder):
    """Keys and values whose first rows are no parameters, so that neither momentum nor weight decay moves them.

    Args:
        tables: [P, numbers] for each group.
        frozen_slots: how many rows are frozen.
    """

    def __init__(self, tables: dict[str, Tensor], frozen_slots: int) -> None:
        super().__init__()
        self.groups = tuple(tables)
        self.rows = nn.ParameterDict()
        for group, table in tables.items():
            held = table.detach().float()
            self.register_buffer(f"frozen_{group}", held[:frozen_slots].clone())
            self.rows[group] = nn.Parameter(held[frozen_slots:].clone())

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Put the frozen rows before the others, [P, numbers]."""
        return torch.cat([getattr(self, f"frozen_{group}"), self.rows[group]])


@dataclass(frozen=True)
class Cartridge(ReadPrefix):
    """A cartridge: P virtual keys and values that take the place of a long document.

    They start as the document's first P and learn by self-distillation: for each row the teacher is the frozen model with the
    whole document before the text, the student the same model with the cartridge there. The loss is the KL divergence on the
    teacher's likeliest tokens, at the positions whose next token is labeled; labels equal to the ids train on the whole text.
    The texts are questions and answers about the document, written by the model or by anybody; the labels' tokens are not a
    target themselves. The document runs once a step, without gradients, and its keys and values serve all rows; train inside
    `with softhooks.kept(model):` (`trainer.train()` too) to run it once for all steps. Evaluation reports the model's own loss on
    the labels.

    Start from AdamW with a learning rate of 2e-2 (the paper). The first slot is frozen, for many models keep an attention sink
    there.

    A document must fit into the model's window, for the teacher reads it whole. Of a longer one make a cartridge for each part;
    put together with `concatenate` they do not answer as the parts together would, unless they are trained together.

    Source: Eyuboglu et al. 2025, arXiv:2506.06266. Differs: what the teacher gives to all tokens but the k likeliest enters the
    KL as one more token, so that the loss is never negative, and 0 where the student is the teacher; the authors leave it out.

    Args:
        num_virtual_tokens: P.
        document: a text or ids. A saved cartridge keeps the ids, to go on training. With a tokenizer that has a BOS token, that
            comes first; then tokenize rows without.
        tokenizer: the model's tokenizer or its name, for a text.
        frozen_slots: how many of the first slots never move.
        distill: train by self-distillation, in language models; False: on the model's own loss, in any model.
        top_k: how many tokens of the teacher's distribution are told apart.

    Shape:
        the encoder returns [P, sum over layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or the document is missing or shorter than the cartridge.
        PromptTooLongError: the document does not fit into the model's window.
        UnsupportedMethodError: the model's attention cannot be entered; or it is to distill and is no causal language model.
    """

    kind: ClassVar[str] = "cartridge"

    document: str | Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    frozen_slots: int = field(default=1, kw_only=True)
    distill: bool = field(default=True, kw_only=True)
    top_k: int = field(default=20, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options, and keep the text as ids."""
        super().__post_init__()
        for option, least in (("frozen_slots", 0), ("top_k", 1)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{option} must be a whole number of {least} or more; it is {value!r}.")
        if self.frozen_slots >= self.num_virtual_tokens:
            raise OptionError(
                f"frozen_slots must leave a slot to train; it is {self.frozen_slots} of {self.num_virtual_tokens}."
            )
        if self.document is None:
            if self.distill:
                raise OptionError("self-distillation needs its document; pass `document=`, or choose distill=False.")
            return
        lead = opening(self.tokenizer) if isinstance(self.document, str) else ()
        ids = lead + ids_of(self.document, self.tokenizer, "document")
        object.__setattr__(self, "document", ids)
        if len(ids) < self.num_virtual_tokens:
            raise OptionError(
                "a cartridge must not be longer than its document.",
                "Use fewer virtual tokens.",
                num_virtual_tokens=self.num_virtual_tokens,
                document=f"{len(ids)} tokens",
            )

    @property
    def ids(self) -> list[int]:
        """The document's ids; none where it is not known."""
        return [int(i) for i in self.document or ()]

    def objective(self) -> Objective | None:
        """Distill the document, or train on the model's own loss."""
        from softhooks.objectives.self_distillation import SelfDistillation  # imports transformers

        return SelfDistillation(self.ids, self.top_k) if self.distill else None

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Read the document with the frozen model, and keep its first P tokens."""
        if self.document is None:
            raise OptionError("a cartridge needs its document to begin; `load` goes on without it.")
        self._check_window(structure)
        tables = self.read(structure, self.ids)
        return self.folded_encoder({group: table[: self.num_virtual_tokens] for group, table in tables.items()})

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder, whose folded form is itself: the frozen slots stay frozen."""
        return CartridgeEncoder(tables, self.frozen_slots)

    def _check_window(self, structure: ModelStructure) -> None:
        positions = structure.entry.positions
        window = positions.trained if positions.limit is None else positions.limit
        if window is not None and len(self.ids) >= window:
            raise PromptTooLongError(
                "a document must fit into the model's window, and leave room for text: the teacher reads it whole.",
                "Shorten it, or make a cartridge for each part of it and use the one that a question is about. Parts joined "
                "with `Cartridge.concatenate` need training together.",
                document=len(self.ids),
                window=window,
            )

    @staticmethod
    def concatenate(
        model: nn.Module, sources: Sequence[str | Path | Handle], name: str = "default", *, trainable: bool = False
    ) -> Any:
        """Put cartridges one behind the other and attach them as one.

        This is not the model with the documents side by side: each cartridge keeps the keys that it learned alone at the start
        of a context, and none was trained with others beside it. The paper reports that two can be joined without training;
        later measurements (arXiv:2606.04557) find that cartridges trained alone and then joined answer no better than chance.
        Train the joined cartridge (`trainable=True`), and check its answers. The text's positions start behind all of them. The
        slots that are frozen in the first stay frozen, those of the others are ordinary ones.

        Warns:
            UserWarning: what is joined was not trained together.

        Args:
            model: the base model of all of them.
            sources: two or more: directories that `load` reads, or cartridges that are attached.
            name: under which to attach the result.
            trainable: go on training it, on the model's own loss.

        Raises:
            OptionError: fewer than two, or one of them is no cartridge, or brings a head of its own.
            PromptMismatchError: they are of different models.
        """
        parts = [_read(source) for source in sources]
        prompt = attach_joined(model, join(parts), name, trainable=trainable, parts=parts)
        warnings.warn(_JOINED.format(count=len(parts)), UserWarning, stacklevel=2)
        return prompt


def attach_joined(
    model: nn.Module, stored: StoredPrompt, name: str, *, trainable: bool, parts: Sequence[StoredPrompt]
) -> Any:
    """Attach a joined cartridge. `softhooks.load`, which can attach, puts its own function in this place."""
    raise ImportError("`Cartridge.concatenate` attaches a prompt; import `softhooks.load` first.")


def join(parts: Sequence[StoredPrompt]) -> StoredPrompt:
    """Join the tables of several cartridges; the first one's frozen slots stay frozen.

    Raises:
        OptionError, PromptMismatchError: they cannot be joined.
    """
    _check_joinable(parts)
    first = parts[0]
    tables = {group: torch.cat([part.tables[group].cpu() for part in parts]) for group in first.tables}
    options = {
        "num_virtual_tokens": sum(part.options["num_virtual_tokens"] for part in parts),
        "frozen_slots": first.options["frozen_slots"],
        "distill": False,
    }
    return dataclasses.replace(first, options=options, tables=tables, source=" + ".join(part.source for part in parts))


def _read(source: str | Path | Handle) -> StoredPrompt:
    """A cartridge as it would be read from a file."""
    return read_checked(source)[0] if isinstance(source, (str, Path)) else source.to_stored()


def _check_joinable(parts: Sequence[StoredPrompt]) -> None:
    kinds = {part.source: part.kind for part in parts}
    if len(parts) < 2 or set(kinds.values()) != {Cartridge.kind} or any(part.heads for part in parts):
        raise OptionError(
            "to concatenate, two cartridges or more are needed, without heads of their own.",
            "Train them on language models, whose heads stay the base's.",
            found=kinds,
            heads=[part.source for part in parts if part.heads] or "none",
        )
    widths = {part.source: {group: table.shape[1] for group, table in part.tables.items()} for part in parts}
    first = next(iter(widths.values()))
    if any(width != first for width in widths.values()) or any(
        part.conventions != parts[0].conventions for part in parts
    ):
        raise PromptMismatchError(
            "cartridges can be put together only if they are of one base model.",
            "Concatenate those of one model.",
            numbers=widths,
            conventions=[part.conventions for part in parts],
        )

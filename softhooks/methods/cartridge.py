"""Cartridges: a few trained keys and values that replace a long document in the context."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from softhooks.errors import OptionError, PromptMismatchError, PromptTooLongError, check_int
from softhooks.formats.stored import StoredPrompt
from softhooks.methods.from_prompt import Handle, read_checked
from softhooks.methods.prefilled_prefix import PrefilledPrefix, bos_ids, ids_of
from softhooks.prompt_encoder import PromptEncoder

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure
    from softhooks.objectives.base import Objective


_JOINED = (
    "{count} cartridges were joined that were not trained together. Measurements (arXiv:2606.04557) find that such a prompt may "
    "answer no better than chance. Train them together (`trainable=True`), or use one cartridge at a time, and check the answers."
)


class CartridgeEncoder(PromptEncoder):
    """Keys and values whose first rows are buffers, so that neither momentum nor weight decay moves them.

    Args:
        tables: the keys and values of each group, [P, numbers].
        frozen_slots: the number of frozen rows.
    """

    def __init__(self, tables: dict[str, Tensor], frozen_slots: int) -> None:
        super().__init__()
        self.groups = tuple(tables)
        self.rows = nn.ParameterDict()
        for group, table in tables.items():
            rows = table.detach().float()
            self.register_buffer(f"frozen_{group}", rows[:frozen_slots].clone())
            self.rows[group] = nn.Parameter(rows[frozen_slots:].clone())

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Concatenate the frozen and the trained rows, [P, numbers]."""
        return torch.cat([getattr(self, f"frozen_{group}"), self.rows[group]])


@dataclass(frozen=True)
class Cartridge(PrefilledPrefix):
    """Cartridge: P virtual keys and values that replace a long document.

    They start as the keys and values of the document's first P tokens, and are trained by self-distillation: for each row the
    teacher is the frozen model with the whole document before the text, the student the same model with the cartridge instead.
    The loss is the KL divergence on the teacher's most likely tokens, at the positions whose next token is labeled; to train on
    the whole text, pass labels equal to the ids. The texts are questions and answers about the document, written by the model or
    by anybody; the tokens of the labels are not targets themselves.

    The document runs once in each step, without gradients, and its keys and values serve all rows. Train inside
    `with softhooks.kept(model):` (also `trainer.train()`) to run it once for all steps. Evaluation reports the model's own loss
    on the labels.

    Start with AdamW and a learning rate of 2e-2 (the paper). The first slot is frozen, as many models keep an attention sink
    there.

    The document must fit into the model's context window, as the teacher reads all of it. For a longer one, make a cartridge for
    each part. Cartridges that are joined with `concatenate` do not answer as the parts together would, unless they are trained
    together.

    Source: Eyuboglu et al. 2025, arXiv:2506.06266. Differs: the probability of all tokens but the teacher's k most likely enters
    the KL as one more token, so that the loss is never negative, and 0 if the student equals the teacher; the authors leave it
    out.

    Args:
        num_virtual_tokens: P.
        document: a text or ids. A saved cartridge has the ids, for further training. A text starts with the tokenizer's BOS
            token if it has one; tokenize rows without BOS then.
        tokenizer: the model's tokenizer or its name, for a text.
        frozen_slots: the number of slots at the start that are not trained.
        distill: train by self-distillation, in causal language models; False: train on the model's own loss, in any model.
        top_k: the number of most likely tokens of the teacher that are compared one by one.

    Shape:
        the encoder returns [P, sum over layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or the document is missing or shorter than the cartridge.
        PromptTooLongError: the document does not fit into the model's context window.
        UnsupportedMethodError: the model's attention cannot be entered, or `distill` is True and the model is not a causal
            language model.
    """

    kind: ClassVar[str] = "cartridge"

    document: str | Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    frozen_slots: int = field(default=1, kw_only=True)
    distill: bool = field(default=True, kw_only=True)
    top_k: int = field(default=20, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options, and replace the text by its ids."""
        super().__post_init__()
        check_int("frozen_slots", self.frozen_slots, 0)
        check_int("top_k", self.top_k)
        if self.frozen_slots >= self.num_virtual_tokens:
            raise OptionError(
                f"frozen_slots is {self.frozen_slots} of {self.num_virtual_tokens} virtual tokens; it must leave a slot to train."
            )
        if self.document is None:
            if self.distill:
                raise OptionError(
                    "self-distillation needs its document, and none is given; pass `document=`, or distill=False."
                )
            return
        lead = bos_ids(self.tokenizer) if isinstance(self.document, str) else ()
        ids = lead + ids_of(self.document, self.tokenizer, "document")
        object.__setattr__(self, "document", ids)
        if len(ids) < self.num_virtual_tokens:
            raise OptionError(
                f"the document has {len(ids)} tokens; a cartridge must not be longer than its document.",
                "Use fewer virtual tokens.",
                num_virtual_tokens=self.num_virtual_tokens,
                document=f"{len(ids)} tokens",
            )

    @property
    def ids(self) -> list[int]:
        """The ids of the document; empty if it is not known."""
        return [int(i) for i in self.document or ()]

    def objective(self) -> Objective | None:
        """Train by self-distillation of the document, or on the model's own loss."""
        from softhooks.objectives.self_distillation import SelfDistillation  # imports transformers

        return SelfDistillation(self.ids, self.top_k) if self.distill else None

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Compute the keys and values of the document with the frozen model, and keep those of its first P tokens."""
        if self.document is None:
            raise OptionError(
                "a new cartridge needs its document to begin with; pass `document=`, or use `load` to continue a saved one."
            )
        self._check_window(structure)
        tables = self.prefill(structure, self.ids)
        return self.folded_encoder({group: table[: self.num_virtual_tokens] for group, table in tables.items()})

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder; folding does not change it, so that frozen slots stay frozen."""
        return CartridgeEncoder(tables, self.frozen_slots)

    def _check_window(self, structure: ModelStructure) -> None:
        positions = structure.entry.positions
        window = positions.trained if positions.limit is None else positions.limit
        if window is not None and len(self.ids) >= window:
            raise PromptTooLongError(
                f"the document has {len(self.ids)} tokens, and the model's window {window}; the teacher reads all of it.",
                "Shorten it, or make a cartridge for each part of it and use the one that a question is about. Parts joined "
                "with `Cartridge.concatenate` need training together.",
                document=len(self.ids),
                window=window,
            )

    @staticmethod
    def concatenate(
        model: nn.Module, sources: Sequence[str | Path | Handle], name: str = "default", *, trainable: bool = False
    ) -> Any:
        """Concatenate cartridges and attach them as one.

        The result does not answer like the model with all documents in its context: each cartridge was trained alone, at the
        start of a context. The paper reports that two can be joined without training; later measurements (arXiv:2606.04557) find
        that such prompts answer no better than chance. Train the joined cartridge (`trainable=True`), and check its answers.

        The text's positions start after all of them. The frozen slots of the first one stay frozen; those of the others do not.

        Warns:
            UserWarning: the cartridges were not trained together.

        Args:
            model: the base model of all of them.
            sources: two or more: directories that `load` reads, or attached cartridges.
            name: the name under which the result is attached.
            trainable: attach it for training, on the model's own loss.

        Returns:
            the attached prompt, a `SoftPrompt`.

        Raises:
            OptionError: there are fewer than two, or one of them is not a cartridge or has a head of its own.
            PromptMismatchError: they are of different models.
        """
        parts = [_read(source) for source in sources]
        prompt = attach_joined(model, join(parts), name, trainable=trainable, parts=parts)
        warnings.warn(_JOINED.format(count=len(parts)), UserWarning, stacklevel=2)
        return prompt


def attach_joined(
    model: nn.Module, stored: StoredPrompt, name: str, *, trainable: bool, parts: Sequence[StoredPrompt]
) -> Any:
    """Attach a joined cartridge. `softhooks.load` replaces this function, as attaching is in a higher layer."""
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
    """Return a cartridge as plain data."""
    return read_checked(source)[0] if isinstance(source, (str, Path)) else source.to_stored()


def _check_joinable(parts: Sequence[StoredPrompt]) -> None:
    kinds = {part.source: part.kind for part in parts}
    if len(parts) < 2 or set(kinds.values()) != {Cartridge.kind} or any(part.heads for part in parts):
        raise OptionError(
            "the prompts cannot be concatenated: it takes two cartridges or more, without heads of their own.",
            "Train them on language models, whose heads are not trained.",
            found=kinds,
            heads=[part.source for part in parts if part.heads] or "none",
        )
    widths = {part.source: {group: table.shape[1] for group, table in part.tables.items()} for part in parts}
    first = next(iter(widths.values()))
    if any(width != first for width in widths.values()) or any(
        part.conventions != parts[0].conventions for part in parts
    ):
        raise PromptMismatchError(
            "the cartridges have different shapes or conventions; only those of one base model can be concatenated.",
            "Concatenate cartridges of one model.",
            numbers=widths,
            conventions=[part.conventions for part in parts],
        )

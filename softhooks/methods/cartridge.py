"""Cartridges: trained keys and values that replace a long document in the context."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import ModelStructure
from softhooks.errors import OptionError, PromptMismatchError, PromptTooLongError, check_int
from softhooks.formats.stored import StoredPrompt
from softhooks.methods.from_prompt import Handle, read_checked
from softhooks.methods.prefilled_prefix import PrefilledPrefix, bos_ids, ids_of
from softhooks.objectives.base import Objective
from softhooks.prompt_encoder import PromptEncoder

_JOINED = (
    "{count} cartridges that were not trained together were joined. According to arXiv:2606.04557, the answers may be no "
    "better than chance. Train them together (`trainable=True`), or use one cartridge at a time."
)


class CartridgeEncoder(PromptEncoder):
    """The keys and values of a cartridge. The frozen ones are buffers, so that neither momentum nor weight decay changes them.

    Args:
        tables: the initial keys and values for each group of attention layers, [P, N], with N numbers per virtual token.
        frozen_slots: the number of virtual tokens at the start that are frozen.
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
        """Concatenate the frozen and the trained keys and values, [P, N]."""
        return torch.cat([getattr(self, f"frozen_{group}"), self.rows[group]])


@dataclass(frozen=True)
class Cartridge(PrefilledPrefix):
    """Cartridge: the trained keys and values of P virtual tokens, which replace a long document.

    They are initialized with the keys and values of the document's first P tokens, and trained by self-distillation: the teacher
    is the frozen model with the whole document before each row, and the student is the model with the cartridge. The rows are
    questions and answers about the document; the model itself can generate them. The loss is the KL divergence between teacher
    and student at the tokens whose label is not -100; to train on whole rows, pass the input ids as labels.

    Each training step runs the model on the document, once for all rows and without gradients. Put the training loop, or
    `trainer.train()`, inside `with softhooks.kept(model):` to do this only once. In evaluation, the model returns its own loss.

    Start with AdamW and a learning rate of 2e-2, as in the paper. By default the first virtual token is frozen, because many
    models use the first token as an attention sink.

    The document must fit in the model's context window. For a longer document, make a cartridge for each part; `concatenate`
    joins cartridges, which must then be trained together.

    Source: Eyuboglu et al. 2025, arXiv:2506.06266. Differences: the authors ignore the tokens outside the teacher's top k; we
    merge them into one term of the KL divergence, so the loss is never negative, and is 0 if the models make equal predictions.

    Args:
        num_virtual_tokens: P.
        document: a string or token ids; the ids are saved for further training. A string is tokenized with the tokenizer's BOS
            token, if there is one; in this case, tokenize the rows without BOS.
        tokenizer: the model's tokenizer or its name; required if the document is a string.
        frozen_slots: the number of virtual tokens at the start that are not trained.
        distill: True trains by self-distillation, which needs a causal language model; False trains any model on its own loss.
        top_k: the number of the teacher's most likely tokens that are compared individually.

    Shape:
        each prefix has the shape [P, sum over layers of Hk * (Dk + Dv)], for Hk key-value heads with keys of size Dk and values
        of size Dv.

    Raises:
        OptionError: an option is wrong, or the document is missing or shorter than the cartridge.
        PromptTooLongError: the document does not fit in the model's context window.
        UnsupportedMethodError: softhooks cannot add a key-value prefix to the model's attention, or `distill` is True and the
            model is not a causal language model.
    """

    kind: ClassVar[str] = "cartridge"

    document: str | Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    frozen_slots: int = field(default=1, kw_only=True)
    distill: bool = field(default=True, kw_only=True)
    top_k: int = field(default=20, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("frozen_slots", self.frozen_slots, 0)
        check_int("top_k", self.top_k)
        if self.frozen_slots >= self.num_virtual_tokens:
            raise OptionError(
                f"frozen_slots is {self.frozen_slots}; it must be less than num_virtual_tokens={self.num_virtual_tokens}."
            )
        if self.document is None:
            if self.distill:
                raise OptionError(
                    "self-distillation needs a document, but none is given; pass `document=`, or use distill=False."
                )
            return
        lead = bos_ids(self.tokenizer) if isinstance(self.document, str) else ()
        ids = lead + ids_of(self.document, self.tokenizer, "document")
        object.__setattr__(self, "document", ids)
        if len(ids) < self.num_virtual_tokens:
            raise OptionError(
                f"the document has {len(ids)} tokens; a cartridge must not be longer than its document.",
                "Reduce num_virtual_tokens.",
                num_virtual_tokens=self.num_virtual_tokens,
                document=f"{len(ids)} tokens",
            )

    @property
    def ids(self) -> list[int]:
        """The ids of the document; empty if there is no document."""
        return [int(i) for i in self.document or ()]

    def objective(self) -> Objective | None:
        """Return the self-distillation objective, or None to train on the model's own loss."""
        from softhooks.objectives.self_distillation import SelfDistillation  # imports transformers

        return SelfDistillation(self.ids, self.top_k) if self.distill else None

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder, initialized with the keys and values of the document's first P tokens."""
        if self.document is None:
            raise OptionError(
                "a new cartridge is initialized from a document, but none is given; pass `document=`, or use `load` for a saved "
                "cartridge."
            )
        self._check_window(structure)
        tables = self.prefill(structure, self.ids)
        return self.folded_encoder({group: table[: self.num_virtual_tokens] for group, table in tables.items()})

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a new or loaded cartridge, whose frozen virtual tokens stay frozen."""
        return CartridgeEncoder(tables, self.frozen_slots)

    def _check_window(self, structure: ModelStructure) -> None:
        positions = structure.entry.positions
        window = positions.trained if positions.limit is None else positions.limit
        if window is not None and len(self.ids) >= window:
            raise PromptTooLongError(
                f"the document has {len(self.ids)} tokens; it must be shorter than the model's context window ({window}).",
                "Shorten the document; or make a cartridge for each part, join them with `Cartridge.concatenate`, and train the "
                "result.",
                document=len(self.ids),
                window=window,
            )

    @staticmethod
    def concatenate(
        model: nn.Module, sources: Sequence[str | Path | Handle], name: str = "default", *, trainable: bool = False
    ) -> Any:
        """Concatenate cartridges and attach them as one prompt.

        The paper reports that two cartridges can be joined without training. But according to arXiv:2606.04557, the answers may
        be no better than chance, because each cartridge was trained alone. So train the joined cartridge (`trainable=True`).

        The text's position ids start after all cartridges. Only the frozen virtual tokens of the first cartridge stay frozen.

        Warns:
            UserWarning: the cartridges were not trained together.

        Args:
            model: the base model of all cartridges.
            sources: two or more cartridges: attached prompts, or directories that `load` reads.
            name: the name of the new prompt.
            trainable: whether to train the new prompt, on the model's own loss.

        Returns:
            the attached prompt, a `SoftPrompt`.

        Raises:
            OptionError: there are fewer than two sources, or a source is not a cartridge or was saved with a head.
            PromptMismatchError: the cartridges were trained on different models.
        """
        parts = [read_checked(s)[0] if isinstance(s, (str, Path)) else s.to_stored() for s in sources]
        prompt = attach_joined(model, join(parts), name, trainable=trainable, parts=parts)
        warnings.warn(_JOINED.format(count=len(parts)), UserWarning, stacklevel=2)
        return prompt


def attach_joined(
    model: nn.Module, stored: StoredPrompt, name: str, *, trainable: bool, parts: Sequence[StoredPrompt]
) -> Any:
    """Attach a joined cartridge. The module `softhooks.load`, which this one must not import, replaces this function."""
    raise ImportError("`Cartridge.concatenate` needs `softhooks.load`, which has not been imported; import it first.")


def join(parts: Sequence[StoredPrompt]) -> StoredPrompt:
    """Concatenate the keys and values of several cartridges."""
    _check_joinable(parts)
    first = parts[0]
    tables = {group: torch.cat([part.tables[group].cpu() for part in parts]) for group in first.tables}
    options = {
        "num_virtual_tokens": sum(part.options["num_virtual_tokens"] for part in parts),
        "frozen_slots": first.options["frozen_slots"],
        "distill": False,
    }
    return dataclasses.replace(first, options=options, tables=tables, source=" + ".join(part.source for part in parts))


def _check_joinable(parts: Sequence[StoredPrompt]) -> None:
    kinds = {part.source: part.kind for part in parts}
    if len(parts) < 2 or set(kinds.values()) != {Cartridge.kind} or any(part.heads for part in parts):
        raise OptionError(
            "these prompts cannot be concatenated; `concatenate` needs two or more cartridges that were saved without a head.",
            "Train the cartridges on language models, whose heads are not trained.",
            found=kinds,
            heads=[part.source for part in parts if part.heads] or "none",
        )
    widths = {part.source: {group: table.shape[1] for group, table in part.tables.items()} for part in parts}
    first = next(iter(widths.values()))
    if any(width != first for width in widths.values()) or any(
        part.conventions != parts[0].conventions for part in parts
    ):
        raise PromptMismatchError(
            "the cartridges differ in shape, or in whether they shift positions; all must be trained on the same base model.",
            "Concatenate only cartridges that were trained on the same model.",
            sizes=widths,
            conventions=[part.conventions for part in parts],
        )

"""Context tuning: the demonstrations' own keys and values are what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from softhooks.encoder import PromptEncoder, TableEncoder, require
from softhooks.errors import OptionError, UnsupportedModeError
from softhooks.methods.text_prefix import ReadPrefix, ids_of, opening

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure

EXAMPLE_IDS = "example_ids"


class DemonstrationEncoder(TableEncoder):
    """Keys and values of demonstrations, and which rows do not see which of them.

    Args:
        tables: [P, numbers] for each group.
        lengths: how many virtual tokens each demonstration has; what is left stands before the first.
        leave_one_out: ask for `example_ids` in training.
        token_dropout: with which probability a virtual token is hidden from a row in training.
    """

    owners: Tensor

    def __init__(
        self, tables: dict[str, Tensor], lengths: Sequence[int], leave_one_out: bool, token_dropout: float
    ) -> None:
        super().__init__(tables)
        count = next(iter(tables.values())).shape[0]
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        lead = torch.full((count - len(owners),), -1)
        self.register_buffer("owners", torch.cat([lead, owners]), persistent=False)
        self.demonstrations = len(lengths)
        self.leave_one_out = leave_one_out
        self.token_dropout = token_dropout

    def hidden(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Hide a row's own demonstration from it, and in training a few virtual tokens at random. -> [B, P]."""
        if self.training and self.leave_one_out:
            why = "a row that is a demonstration must not see its own; -1 for a row that is none"
            require(given, EXAMPLE_IDS, f"{why} (or choose leave_one_out=False)")
        masks = []
        if EXAMPLE_IDS in given:
            rows = self._checked(given[EXAMPLE_IDS], batch).to(self.owners.device)[:, None]
            masks.append((self.owners == rows) & (rows >= 0))
        if self.training and self.token_dropout > 0:
            masks.append(torch.rand(batch, len(self.owners), device=self.owners.device) < self.token_dropout)
        if not masks:
            return None
        return masks[0] if len(masks) == 1 else masks[0] | masks[1]

    def _checked(self, rows: Tensor, batch: int) -> Tensor:
        whole = not rows.is_floating_point() and rows.dtype != torch.bool
        if whole and rows.numel() == batch and int(rows.min()) >= -1 and int(rows.max()) < self.demonstrations:
            return rows.reshape(batch)
        raise UnsupportedModeError(
            "`example_ids` must say of each row which demonstration it is, counted from 0; -1 where it is none.",
            "Give one whole number a row.",
            example_ids=f"{rows.dtype} {list(rows.shape)}, {rows.flatten().tolist()[:8]}",
            batch=batch,
            demonstrations=self.demonstrations,
        )


@dataclass(frozen=True)
class ContextTuning(ReadPrefix):
    """Context tuning: few-shot demonstrations are read once, and their keys and values trained as a prefix.

    Before the first step the model answers as with the demonstrations in its context. The rows to train on are the
    demonstrations themselves, each split into text and label. Two things keep them from being looked up in the prefix:
    - `leave_one_out`: the batch's column `example_ids` says which demonstration a row is, counted from 0 (-1: none), and the row
      does not see its keys and values. Later demonstrations have read it, in the frozen model, and stay visible. A row that
      brings its id is masked in evaluation too.
    - `token_dropout`: in training each virtual token is hidden from a row with this probability, one draw a row and forward.

    Start from AdamW with a learning rate of 1e-3. Rows must be tokenized as they would follow the demonstrations: where those
    begin with BOS, without another.

    Source: Lu et al. 2025, arXiv:2507.04221, its key-value variant (CT-KV). Differs: `instruction` is ours, and so are
    encoder-decoders: there both sides read the demonstrations, and each of the three prefixes draws its own dropout.

    Args:
        num_virtual_tokens: P; the demonstrations say it, so leave it out.
        demonstrations: texts or lists of ids, one a demonstration, each with what separates it from the next.
        instruction: a text or ids before the first demonstration. Before texts comes the tokenizer's BOS token, if any.
        tokenizer: the model's tokenizer or its name, for texts.
        leave_one_out: ask for `example_ids` in training.
        token_dropout: 0.05 to 0.1 in the paper.
        lengths: how many virtual tokens each demonstration has. The demonstrations say it; a saved prompt keeps it, so that it
            goes on training under the same masks.

    Shape:
        the encoder returns [P, sum over layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or the demonstrations are missing.
        UnsupportedMethodError: the model's attention cannot be entered.
    """

    kind: ClassVar[str] = "context_tuning"
    columns: ClassVar[tuple[str, ...]] = (EXAMPLE_IDS,)
    start_options: ClassVar[tuple[str, ...]] = ("demonstrations", "instruction")

    num_virtual_tokens: int = 0
    demonstrations: Sequence[str] | Sequence[Sequence[int]] = field(default=(), kw_only=True)
    instruction: str | Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    leave_one_out: bool = field(default=True, kw_only=True)
    token_dropout: float = field(default=0.05, kw_only=True)
    lengths: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options, and keep texts as ids."""
        if isinstance(self.demonstrations, str):
            raise OptionError("demonstrations must be a list, one item a demonstration; it is one text.")
        if len(self.demonstrations):
            self._tokenize()
        given: Any = self.lengths
        whole = isinstance(given, (list, tuple)) and all(type(n) is int and n > 0 for n in given)
        if not whole or not given:
            raise OptionError(
                "context tuning needs its demonstrations: one or more.",
                "Pass `demonstrations=`, a list of texts with a `tokenizer=`, or of lists of ids.",
                demonstrations=repr(self.demonstrations),
                lengths=repr(given),
            )
        object.__setattr__(self, "lengths", tuple(given))
        super().__post_init__()
        if sum(given) > self.num_virtual_tokens:
            raise OptionError(
                f"lengths must add up to num_virtual_tokens at most; they are {list(given)} and {self.num_virtual_tokens}."
            )
        if not 0.0 <= self.token_dropout < 1.0:
            raise OptionError(f"token_dropout must be at least 0 and below 1; it is {self.token_dropout}.")

    def _tokenize(self) -> None:
        """Turn what was given into ids, and count them."""
        shots = tuple(ids_of(shot, self.tokenizer, "demonstrations") for shot in self.demonstrations)
        texts = any(isinstance(text, str) for text in (*self.demonstrations, self.instruction))
        lead = opening(self.tokenizer) if texts else ()
        if self.instruction is not None and len(self.instruction):
            lead += ids_of(self.instruction, self.tokenizer, "instruction")
        lengths = tuple(len(shot) for shot in shots)
        count = len(lead) + sum(lengths)
        for option, asked, found in (
            ("lengths", None if self.lengths is None else tuple(self.lengths), lengths),
            ("num_virtual_tokens", self.num_virtual_tokens or None, count),
        ):
            if asked not in (None, found):
                raise OptionError(f"{option} follows from the demonstrations: {found}; it is given as {asked}.")
        kept = {"demonstrations": shots, "instruction": lead, "lengths": lengths, "num_virtual_tokens": count}
        for option, value in kept.items():
            object.__setattr__(self, option, value)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Read the demonstrations with the frozen model."""
        if not len(self.demonstrations):
            raise OptionError("context tuning needs its demonstrations to begin; `load` goes on without them.")
        ids = [*(self.instruction or ()), *(i for shot in self.demonstrations for i in shot)]
        return self.folded_encoder(self.read(structure, ids))

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder, whose folded form is itself; the masks come with it."""
        return DemonstrationEncoder(tables, self.lengths or (), self.leave_one_out, self.token_dropout)

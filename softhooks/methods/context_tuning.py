"""Context tuning: training of the keys and values of few-shot demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.errors import OptionError, check_dropout, is_int
from softhooks.methods.leave_one_out import EXAMPLE_IDS, hide_own_example
from softhooks.methods.prefilled_prefix import PrefilledPrefix, bos_ids, ids_of
from softhooks.prompt_encoder import PromptEncoder, TableEncoder


class DemonstrationEncoder(TableEncoder):
    """Keys and values of demonstrations, some of which are hidden from some rows.

    Args:
        tables: the keys and values of each group, [P, numbers].
        lengths: the number of virtual tokens of each demonstration; other virtual tokens come before the first demonstration.
        leave_one_out: require `example_ids` in training.
        token_dropout: the probability that a virtual token is hidden from a row in training.
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

    def hidden_tokens(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Hide each row's own demonstration and, in training, random virtual tokens. -> [B, P]."""
        required = self.training and self.leave_one_out
        own = hide_own_example(given, batch, self.owners, self.demonstrations, required=required)
        if not self.training or self.token_dropout == 0:
            return own
        dropped = torch.rand(batch, len(self.owners), device=self.owners.device) < self.token_dropout
        return dropped if own is None else own | dropped


@dataclass(frozen=True)
class ContextTuning(PrefilledPrefix):
    """Context tuning: a trained prefix that is initialized with the keys and values of few-shot demonstrations.

    Before the first step the model's output is the same as with the demonstrations in its context. The training rows are the
    demonstrations themselves, each split into text and label. Two options keep the model from looking up the answers in the
    prefix:
    - `leave_one_out`: the batch column `example_ids` has the number of the row's own demonstration, from 0, or -1 for none; the
      row does not see the keys and values of this demonstration. Later demonstrations stay visible, although the frozen model
      computed them with this demonstration in their context. Rows with `example_ids` are masked in evaluation too.
    - `token_dropout`: in training each virtual token is hidden from a row with this probability, sampled in each forward.

    Start with AdamW and a learning rate of 1e-3. Tokenize rows as a continuation of the demonstrations: without BOS if the
    demonstrations start with BOS.

    Source: Lu et al. 2025, arXiv:2507.04221, the key-value variant (CT-KV). Differs: `instruction` is ours. So is the
    support of encoder-decoders, where encoder and decoder both read the demonstrations and each of the three prefixes has its own
    dropout.

    Args:
        num_virtual_tokens: P, which is computed from the demonstrations; leave it out.
        demonstrations: texts or lists of ids, one for each demonstration, including the separator before the next one.
        instruction: a text or ids before the first demonstration. Texts are tokenized with the tokenizer's BOS token at the
            start.
        tokenizer: the model's tokenizer or its name, for texts.
        leave_one_out: require `example_ids` in training.
        token_dropout: the probability of hiding a virtual token; 0.05 to 0.1 in the paper.
        lengths: the number of virtual tokens of each demonstration, which is computed from the demonstrations, and saved for the
            masks of further training.

    Shape:
        the encoder returns [P, sum over layers of Hk * (Dk + Dv)] for each group.

    Raises:
        OptionError: an option is wrong, or the demonstrations are missing.
        UnsupportedMethodError: prompts cannot enter the model's attention.
    """

    kind: ClassVar[str] = "context_tuning"
    columns: ClassVar[tuple[str, ...]] = (EXAMPLE_IDS,)
    init_options: ClassVar[tuple[str, ...]] = ("demonstrations", "instruction")

    num_virtual_tokens: int = 0
    demonstrations: Sequence[str] | Sequence[Sequence[int]] = field(default=(), kw_only=True)
    instruction: str | Sequence[int] | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    leave_one_out: bool = field(default=True, kw_only=True)
    token_dropout: float = field(default=0.05, kw_only=True)
    lengths: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.demonstrations, str):
            raise OptionError(
                "demonstrations is a single text; it must be a list with one item for each demonstration."
            )
        if len(self.demonstrations):
            self._tokenize()
        given: Any = self.lengths
        whole = isinstance(given, (list, tuple)) and all(is_int(length, 1) for length in given)
        if not whole or not given:
            raise OptionError(
                "there are no demonstrations; context tuning needs at least one.",
                "Pass `demonstrations=`, a list of texts with a `tokenizer=`, or a list of lists of ids.",
                demonstrations=repr(self.demonstrations),
                lengths=repr(given),
            )
        object.__setattr__(self, "lengths", tuple(given))
        super().__post_init__()
        if sum(given) > self.num_virtual_tokens:
            raise OptionError(
                f"lengths {list(given)} add up to more than num_virtual_tokens={self.num_virtual_tokens}."
            )
        check_dropout("token_dropout", self.token_dropout)

    def _tokenize(self) -> None:
        """Tokenize the demonstrations and the instruction, and count their ids."""
        shots = tuple(ids_of(shot, self.tokenizer, "demonstrations") for shot in self.demonstrations)
        texts = any(isinstance(text, str) for text in (*self.demonstrations, self.instruction))
        lead = bos_ids(self.tokenizer) if texts else ()
        if self.instruction is not None and len(self.instruction):
            lead += ids_of(self.instruction, self.tokenizer, "instruction")
        lengths = tuple(len(shot) for shot in shots)
        count = len(lead) + sum(lengths)
        for option, asked, found in (
            ("lengths", None if self.lengths is None else tuple(self.lengths), lengths),
            ("num_virtual_tokens", self.num_virtual_tokens or None, count),
        ):
            if asked not in (None, found):
                raise OptionError(f"{option} is {asked}, but the demonstrations have {found}; leave {option} out.")
        kept = {"demonstrations": shots, "instruction": lead, "lengths": lengths, "num_virtual_tokens": count}
        for option, value in kept.items():
            object.__setattr__(self, option, value)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Compute the keys and values of the demonstrations with the frozen model."""
        if not len(self.demonstrations):
            raise OptionError(
                "a new prompt of context tuning is initialized from demonstrations, but none are given; pass `demonstrations=`, "
                "or use `load` to continue a saved prompt."
            )
        ids = [*(self.instruction or ()), *(i for shot in self.demonstrations for i in shot)]
        return self.folded_encoder(self.prefill(structure, ids))

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder; folding does not change it, to keep the masks."""
        return DemonstrationEncoder(tables, self.lengths or (), self.leave_one_out, self.token_dropout)

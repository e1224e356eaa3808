"""Context tuning: train the keys and values of few-shot demonstrations."""

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
    """The trained keys and values of demonstrations. `ContextTuning` documents the options.

    Args:
        tables: the initial keys and values for each group of attention layers, [P, N], with N numbers per virtual token.
    """

    owners: Tensor

    def __init__(
        self, tables: dict[str, Tensor], lengths: Sequence[int], leave_one_out: bool, token_dropout: float
    ) -> None:
        super().__init__(tables)
        count = next(iter(tables.values())).shape[0]
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        lead = torch.full((count - len(owners),), -1)  # the instruction
        self.register_buffer("owners", torch.cat([lead, owners]), persistent=False)
        self.demonstrations = len(lengths)
        self.leave_one_out = leave_one_out
        self.token_dropout = token_dropout

    def hidden_tokens(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Return a mask, [B, P], that hides each row's own demonstration and, during training, random virtual tokens."""
        required = self.training and self.leave_one_out
        own = hide_own_example(given, batch, self.owners, self.demonstrations, required=required)
        if not self.training or self.token_dropout == 0:
            return own
        dropped = torch.rand(batch, len(self.owners), device=self.owners.device) < self.token_dropout
        return dropped if own is None else own | dropped


@dataclass(frozen=True)
class ContextTuning(PrefilledPrefix):
    """Context tuning: a trained prefix that is initialized with the keys and values of few-shot demonstrations.

    Before the first step the model's output is the same as with the demonstrations in its context. Training rows are usually the
    demonstrations themselves, split into input and label. Two options keep the model from looking up the answers in the prefix:
    - `leave_one_out`: a row does not attend to its own demonstration. The batch column `example_ids` has the index of this
      demonstration, or -1 for a row that is not a demonstration. The keys and values of later demonstrations still depend on the
      hidden one. In evaluation, a row's own demonstration is hidden too, if the batch has `example_ids`.
    - `token_dropout`: during training, random virtual tokens are hidden from each row.

    Start with AdamW and a learning rate of 3e-2. Tokenize rows without a BOS token if the demonstrations start with one.

    Source: Lu et al. 2025, arXiv:2507.04221, the key-value variant (CT-KV). Differences: we add `instruction`, and support
    encoder-decoders, whose encoder and decoder both read the demonstrations.

    Args:
        num_virtual_tokens: P, which is computed from the demonstrations; leave it out.
        demonstrations: a string or token ids for each demonstration, including the separator that follows it.
        instruction: a string or token ids before the demonstrations. If it or a demonstration is a string, the tokenizer's BOS
            token comes first.
        tokenizer: the model's tokenizer or its name; required for strings.
        leave_one_out: hide each row's own demonstration; requires `example_ids` during training.
        token_dropout: the probability that a virtual token is hidden from a row; 0.05 to 0.1 in the paper.
        lengths: the number of tokens in each demonstration, which is computed and saved with the prompt; leave it out.

    Shape:
        each prefix has the shape [P, sum over layers of Hk * (Dk + Dv)], for Hk key-value heads with keys of size Dk and values
        of size Dv.

    Raises:
        OptionError: an option is wrong, or the demonstrations are missing.
        UnsupportedMethodError: softhooks cannot add a key-value prefix to the model's attention.
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
                "demonstrations is a string; it must be a list of demonstrations, each a string or a list of token ids."
            )
        if len(self.demonstrations):
            self._tokenize()
        given: Any = self.lengths
        whole = isinstance(given, (list, tuple)) and all(is_int(length, 1) for length in given)
        if not whole or not given:
            raise OptionError(
                "there are no demonstrations; context tuning needs at least one.",
                "Pass `demonstrations=`: a list of strings, with `tokenizer=`, or a list of lists of token ids.",
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
        """Replace strings with token ids, and set `lengths` and `num_virtual_tokens`."""
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
                raise OptionError(f"{option} is {asked}, but its computed value is {found}; leave {option} out.")
            object.__setattr__(self, option, found)
        object.__setattr__(self, "demonstrations", shots)
        object.__setattr__(self, "instruction", lead)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Compute the keys and values of the demonstrations with the frozen model."""
        if not len(self.demonstrations):
            raise OptionError(
                "a new context-tuning prompt is initialized from demonstrations, but none are given; pass `demonstrations=`, or "
                "use `load` for a saved prompt."
            )
        ids = [*(self.instruction or ()), *(i for shot in self.demonstrations for i in shot)]
        return self.folded_encoder(self.prefill(structure, ids))

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a new or loaded prompt; in both cases, it hides each row's own demonstration."""
        return DemonstrationEncoder(tables, self.lengths or (), self.leave_one_out, self.token_dropout)

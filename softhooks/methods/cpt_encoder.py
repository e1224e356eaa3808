"""The encoders of context-aware prompt tuning: the embeddings of a context plus bounded, learned deltas."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softhooks.errors import PromptMismatchError
from softhooks.layout.few_shot import Context
from softhooks.methods.leave_one_out import hide_own_example
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder

_TARGET, _LIMIT = 1 - 2.0**-19, 1 - 2.0**-20
"""A delta longer than `_LIMIT` times its bound is scaled to `_TARGET` times the bound. Both factors are below 1, so that rounding
neither exceeds the bound nor makes the next step scale the delta again."""

_SAME_WORD = 2.0**-7
"""The largest allowed difference between a saved embedding and the model's, relative to its norm: the precision of bfloat16."""


class ContextRows(PromptEncoder):
    """A context whose examples can be hidden from rows of the batch."""

    groups = (EMBEDDINGS,)
    examples: Tensor

    def __init__(self, context: Context, leave_one_out: bool) -> None:
        super().__init__()
        self.count = context.count
        self.leave_one_out = leave_one_out
        self.register_buffer("examples", torch.tensor(context.examples), persistent=False)

    def hidden_tokens(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Return a mask, [B, P], that hides each row's own example."""
        required = self.leave_one_out and self.training and torch.is_grad_enabled()
        return hide_own_example(given, batch, self.examples, self.count, required=required)


class ContextEncoder(ContextRows):
    """The embeddings of the context, plus learned deltas for M of its tokens. Labels and separators have no delta.

    Args:
        context: the token ids and their types.
        words: E, the embeddings of the tokens, [P, H].
        bounds: the largest allowed norm of each delta, [M].
        leave_one_out: require `example_ids` during training.
    """

    is_constrained = True
    words: Tensor
    movable: Tensor
    bounds: Tensor

    def __init__(self, context: Context, words: Tensor, bounds: Sequence[float], leave_one_out: bool) -> None:
        super().__init__(context, leave_one_out)
        self.register_buffer("words", words.detach().clone(), persistent=False)
        self.register_buffer("movable", torch.tensor(context.movable, device=words.device), persistent=False)
        self.register_buffer("bounds", torch.tensor(bounds, device=words.device), persistent=False)
        self.delta = nn.Parameter(torch.zeros(len(bounds), words.shape[1], device=words.device))
        self._projected: Tensor | None = None  # which tokens the last step moved beyond their bounds, [M]

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute E + delta, [P, H]."""
        return self.words.index_add(0, self.movable, self.delta)

    def constrain(self) -> None:
        """Scale each delta that exceeds its bound back to the bound."""
        lengths = torch.linalg.vector_norm(self.delta, dim=1)
        beyond = self._projected = lengths > self.bounds * _LIMIT
        scale = torch.where(beyond, self.bounds * _TARGET / lengths, torch.ones_like(lengths))
        self.delta.copy_(torch.where(beyond[:, None], self.delta * scale[:, None], self.delta))

    def metrics(self) -> dict[str, float]:
        """Return the share of deltas that exceeded their bounds after the last optimizer step."""
        return {} if self._projected is None else {"projected": float(self._projected.float().mean())}

    @property
    def reach(self) -> Tensor:
        """The bound of each delta relative to the norm of its embedding, [M]."""
        reach: Tensor = self.bounds / torch.linalg.vector_norm(self.words[self.movable], dim=1)
        return reach

    @torch.no_grad()
    def load_folded(self, table: Tensor) -> None:
        """Compute the deltas from a folded context."""
        moved = table.to(self.words) - self.words
        fixed = torch.ones(len(moved), dtype=torch.bool, device=moved.device)
        fixed[self.movable] = False
        off = torch.linalg.vector_norm(moved, dim=1) / torch.linalg.vector_norm(self.words, dim=1).clamp(min=1e-12)
        if bool((off[fixed] > _SAME_WORD).any()):
            raise PromptMismatchError(
                "the embeddings of the context's labels and separators, which are not trained, differ from this model's.",
                "Load the prompt onto the base model that it was trained with.",
                token=int((off * fixed).argmax()),
                difference=f"{float(off[fixed].max()):.2g} of the norm of the embedding",
            )
        self.delta.copy_(moved[self.movable])
        beyond = int((torch.linalg.vector_norm(self.delta, dim=1) > self.bounds * (1 + _SAME_WORD)).sum())
        if beyond:
            warnings.warn(
                f"{beyond} embeddings of this context exceed their bounds and are scaled back to them.",
                stacklevel=2,
            )
        self.constrain()
        self._projected = None


class FoldedContext(ContextRows):
    """A folded context. Its embeddings are a buffer, because an optimizer would also change the embeddings of the labels."""

    embeddings: Tensor

    def __init__(self, context: Context, table: Tensor) -> None:
        super().__init__(context, leave_one_out=False)
        self.register_buffer("embeddings", table.detach().float().clone())

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the embeddings, [P, H]."""
        return self.embeddings

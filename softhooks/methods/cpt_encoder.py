"""The encoder of context-aware prompt tuning: words, what was learned on top of them, and how far that may go."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softhooks.encoder import EMBEDDINGS, PromptEncoder, require
from softhooks.errors import PromptMismatchError, UnsupportedModeError
from softhooks.layout.few_shot import Context

EXAMPLE_IDS = "example_ids"
"""The batch column that says which example of the context a row is."""

_NEAR, _BEYOND = 1 - 2.0**-19, 1 - 2.0**-20
"""Where a row is brought back to, and from where on: rounding leaves it inside its bound, and the next time untouched."""

_SAME_WORD = 2.0**-7
"""How near a stored word must be to the model's own, relative to its length: the precision of bfloat16."""


class ContextRows(PromptEncoder):
    """A context as rows of embeddings; a row of the batch may leave out one of its examples.

    Args:
        context: the tokens and their types.
        asks: whether each training forward must say which rows are examples.
    """

    groups = (EMBEDDINGS,)
    examples: Tensor

    def __init__(self, context: Context, asks: bool) -> None:
        super().__init__()
        self.count = context.count
        self.asks = asks
        self.register_buffer("examples", torch.tensor(context.examples), persistent=False)

    def hidden(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Hide a row's own example from it. -> [B, P]."""
        if self.asks and self.training and torch.is_grad_enabled():
            require(given, EXAMPLE_IDS, "a row that is an example must not see itself; -1 for a row that is none")
        if EXAMPLE_IDS not in given:
            return None
        own = self._checked(given[EXAMPLE_IDS], batch).to(self.examples.device)[:, None]
        return (self.examples == own) & (own >= 0)

    def _checked(self, rows: Tensor, batch: int) -> Tensor:
        whole = not rows.is_floating_point() and rows.dtype != torch.bool
        if whole and rows.numel() == batch and int(rows.min()) >= -1 and int(rows.max()) < self.count:
            return rows.reshape(batch)
        raise UnsupportedModeError(
            f"`{EXAMPLE_IDS}` must say of each row which example of the context it is, counted from 0; -1 where it is none.",
            "Give one whole number a row.",
            example_ids=f"{rows.dtype} {list(rows.shape)}, {rows.flatten().tolist()[:8]}",
            batch=batch,
            examples=self.count,
        )


class ContextEncoder(ContextRows):
    """Words that may move: `E + delta`. Labels and separators have no delta, so nothing can move them.

    Args:
        context: the tokens and their types.
        words: E, their rows in the model's embedding, [P, H].
        bounds: for each token that moves, how long its delta may be.
        asks: whether each training forward must say which rows are examples.
    """

    is_constrained = True
    words: Tensor
    movable: Tensor
    bounds: Tensor

    def __init__(self, context: Context, words: Tensor, bounds: Sequence[float], asks: bool) -> None:
        super().__init__(context, asks)
        self.register_buffer("words", words.detach().clone(), persistent=False)
        self.register_buffer("movable", torch.tensor(context.movable, device=words.device), persistent=False)
        self.register_buffer("bounds", torch.tensor(bounds, device=words.device), persistent=False)
        self.delta = nn.Parameter(torch.zeros(len(bounds), words.shape[1], device=words.device))
        self._projected: Tensor | None = None  # which tokens the last step had moved too far, [M]

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Add what was learned to the words, [P, H]."""
        return self.words.index_add(0, self.movable, self.delta)

    def constrain(self) -> None:
        """Bring each delta that is too long back to its bound."""
        lengths = torch.linalg.vector_norm(self.delta, dim=1)
        beyond = self._projected = lengths > self.bounds * _BEYOND
        scale = torch.where(beyond, self.bounds * _NEAR / lengths, torch.ones_like(lengths))
        self.delta.copy_(torch.where(beyond[:, None], self.delta * scale[:, None], self.delta))

    def metrics(self) -> dict[str, float]:
        """Of the tokens that may move, the share that the last step moved too far, so that they were brought back."""
        return {} if self._projected is None else {"projected": float(self._projected.float().mean())}

    @property
    def reach(self) -> Tensor:
        """How far each token may move, in lengths of its word, [M]: `epsilon / ||E||`."""
        reach: Tensor = self.bounds / torch.linalg.vector_norm(self.words[self.movable], dim=1)
        return reach

    @torch.no_grad()
    def take(self, table: Tensor) -> None:
        """Go on from a folded context.

        Raises:
            PromptMismatchError: its labels or separators are not this model's.
        """
        moved = table.to(self.words) - self.words
        fixed = torch.ones(len(moved), dtype=torch.bool, device=moved.device)
        fixed[self.movable] = False
        off = torch.linalg.vector_norm(moved, dim=1) / torch.linalg.vector_norm(self.words, dim=1).clamp(min=1e-12)
        if bool((off[fixed] > _SAME_WORD).any()):
            raise PromptMismatchError(
                "the labels and separators of a context never move: they must be the model's own words.",
                "Load it onto the base model that it was trained with.",
                token=int((off * fixed).argmax()),
                off_by=f"{float(off[fixed].max()):.2g} of its word's length",
            )
        self.delta.copy_(moved[self.movable])
        beyond = int((torch.linalg.vector_norm(self.delta, dim=1) > self.bounds * (1 + _SAME_WORD)).sum())
        if beyond:
            warnings.warn(
                f"{beyond} tokens of this context lie beyond their bounds and are brought back.", stacklevel=2
            )
        self.constrain()
        self._projected = None


class FoldedContext(ContextRows):
    """A context that is done: words and what was learned are one. It has no parameters: an optimizer would move labels too."""

    embeddings: Tensor

    def __init__(self, context: Context, table: Tensor) -> None:
        super().__init__(context, asks=False)
        self.register_buffer("embeddings", table.detach().float().clone())

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the rows, [P, H]."""
        return self.embeddings

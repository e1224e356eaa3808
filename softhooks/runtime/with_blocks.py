"""The open `with` blocks that select prompts (`softhooks.rows`, ...), stored per thread and asyncio task in a context variable.

An asyncio task or `asyncio.to_thread` inherits the blocks in which it is started; a plain thread does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from torch import Tensor, nn

_blocks: ContextVar[tuple[Block, ...]] = ContextVar("softhooks_blocks", default=())


@dataclass(eq=False)
class Block:
    """A `with` block, or a call of `generate`, on one model.

    Attributes:
        model: the model that was passed to `attach`.
        rows: one prompt name for each row, as in `softhooks.rows`.
        lengths: for a forward of a continuous batch, the number of tokens of each request; `rows` then has one name for each
            request, and surrounding blocks have no effect.
        off: whether all prompts are off, as in `softhooks.disabled`.
        only: the name of one prompt for all rows; surrounding blocks then have no effect.
        generates: whether this is a call of `generate`.
        repeats: in `generate`, the number of beams or samples for each row.
        prompt_columns: in `generate`, the length of the input, including padding.
        mask: in `generate`, the attention mask of the input, [B, T], with a row for each beam or sample; None if there is none.
    """

    model: nn.Module
    rows: Sequence[str | None] | None = None
    lengths: Sequence[int] | None = None
    off: bool = False
    only: str | None = None
    generates: bool = False
    repeats: int = 1
    prompt_columns: int | None = None
    mask: Tensor | None = None
    _left: bool = field(default=False, init=False)
    _token: Token[tuple[Block, ...]] | None = field(default=None, init=False)

    def __enter__(self) -> Block:
        self._token = _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Blocks in generators can end in any order, so blocks that were entered later may still be open.
        token, now = self._token, _blocks.get()
        self._token = None
        if token is None:
            return
        try:
            token.var.reset(token)
        except ValueError:  # a generator was closed in a different context than it was started in
            self._left = True
        _blocks.set(tuple(block for block in now if block is not self))


def blocks_of(model: nn.Module) -> Sequence[Block]:
    """Return the open blocks of one model in this context, outermost first."""
    found = _blocks.get()
    return found and [block for block in found if block.model is model and not block._left]


def generation_of(model: nn.Module) -> Block | None:
    """Return the innermost call to `generate` on a model in this context."""
    return next((block for block in reversed(blocks_of(model)) if block.generates), None)


class Choice(NamedTuple):
    """The combined selection of a model's open blocks, with the attributes of `Block`."""

    rows: Sequence[str | None] | None = None
    off: bool = False
    only: str | None = None
    lengths: Sequence[int] | None = None


_NO_CHOICE = Choice()


def choice_of(model: nn.Module) -> Choice:
    """Return the combined selection of a model's open blocks."""
    # This runs several times per token, so it loops over the blocks only once.
    rows, off = None, False
    for block in reversed(_blocks.get()):
        if block.model is not model or block._left:
            continue
        if block.only is not None:
            return Choice(rows, off, block.only)
        if block.lengths is not None:
            return Choice(block.rows, off, None, block.lengths)
        rows = block.rows if rows is None else rows
        off = off or block.off
    return _NO_CHOICE if rows is None and not off else Choice(rows, off)


def repeats_of(model: nn.Module) -> int:
    """Return how many rows of a batch use each entry of `rows`: in `generate`, the number of beams or samples; otherwise 1."""
    for block in reversed(blocks_of(model)):
        if block.generates:
            return block.repeats
        if block.rows is not None or block.only is not None:
            return 1
    return 1

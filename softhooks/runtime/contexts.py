"""What a `with` block says about the forwards inside it: context variables, so that it holds in its own thread and asyncio task.

A thread or task that is started inside inherits what Python lets it inherit: a task and `asyncio.to_thread` do, a plain thread
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from torch import nn

_blocks: ContextVar[tuple[Block, ...]] = ContextVar("softhooks_blocks", default=())


@dataclass(eq=False)
class Block:
    """One `with` block, or one call of `generate`, on one model.

    Attributes:
        model: the model, as the user gave it when the first prompt was attached.
        rows: one prompt name a row, as `softhooks.rows` names them.
        off: the bare model, as in `softhooks.disabled`.
        alone: one prompt on for all rows, whatever is named outside.
        generates: this is a call of `generate`.
        repeats: how many rows of the batch each named row stands for in it: its beams or samples.
        prompt_columns: how many columns it was given.
    """

    model: nn.Module
    rows: Sequence[str | None] | None = None
    off: bool = False
    alone: str | None = None
    generates: bool = False
    repeats: int = 1
    prompt_columns: int | None = None
    _left: bool = field(default=False, init=False)
    _token: Token[tuple[Block, ...]] | None = field(default=None, init=False)

    def __enter__(self) -> Block:
        """Hold from here on, in this context."""
        self._token = _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hold no more; blocks that were entered later and are still open stay (generators are left in any order)."""
        token, now = self._token, _blocks.get()
        self._token = None
        if token is None:
            return
        try:
            token.var.reset(token)
        except ValueError:  # a generator that was closed in another context than it was started in
            self._left = True
        _blocks.set(tuple(block for block in now if block is not self))


def blocks_of(model: nn.Module) -> Sequence[Block]:
    """The blocks of one model that hold in this context, the outermost first."""
    found = _blocks.get()
    return found and [block for block in found if block.model is model and not block._left]


def generation_of(model: nn.Module) -> Block | None:
    """The innermost call of `generate` on a model in this context."""
    return next((block for block in reversed(blocks_of(model)) if block.generates), None)


class Choice(NamedTuple):
    """What the blocks of a model say about its prompts.

    Attributes:
        rows: one prompt name a row, where a block names them.
        off: whether a block turns every prompt off.
        alone: the prompt that a block has on, in the place of the model's own choice and of what is said outside of it.
    """

    rows: Sequence[str | None] | None = None
    off: bool = False
    alone: str | None = None


_NOTHING_SAID = Choice()


def choice_of(model: nn.Module) -> Choice:
    """What holds in this context. Asked several times a token, so all is found in one walk."""
    rows, off = None, False
    for block in reversed(_blocks.get()):
        if block.model is not model or block._left:
            continue
        if block.alone is not None:
            return Choice(rows, off, block.alone)
        rows = block.rows if rows is None else rows
        off = off or block.off
    return _NOTHING_SAID if rows is None and not off else Choice(rows, off)


def alone_of(model: nn.Module) -> str | None:
    """The prompt that a `with` block has on, in the place of the model's own choice."""
    return choice_of(model).alone


def repeats_of(model: nn.Module) -> int:
    """How many rows of the batch each named row stands for: 1 outside of a `generate` that was called within its `rows`."""
    for block in reversed(blocks_of(model)):
        if block.generates:
            return block.repeats
        if block.rows is not None or block.alone is not None:
            return 1
    return 1

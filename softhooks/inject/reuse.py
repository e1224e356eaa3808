"""Where what a prompt gives may be used again: inside one `generate` call, one continuous batch, or `softhooks.kept`.

Keys and values that a prompt has from the base depend on everything in it: weights that may change through `.data`, hooks,
attributes, modules that are swapped. No check that is cheap enough for every token sees all of that. So each forward computes
them afresh, unless a scope is open in which nothing changes; the results belong to that scope and end with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from softhooks.backbone.stack import Stack
from softhooks.compat.peft_layers import switches

T = TypeVar("T")


@dataclass
class _Result:
    """What was computed, and what it was seen to depend on."""

    value: Any
    place: tuple[Any, ...]
    values: list[Tensor]


class Scope:
    """A stretch of time in which nothing of a model and its prompts changes.

    Args:
        model: the model, as the user gave it when the first prompt was attached.
        is_explicit: whether the user opened it, rather than a `generate` call.
    """

    def __init__(self, model: object, is_explicit: bool = False) -> None:
        self.model = model
        self.is_explicit = is_explicit
        self.is_open = True
        self.results: dict[Memory[Any], _Result] = {}
        self.snapshots: dict[int, tuple[list[Any], Any]] = {}  # of prompts, by where their tensors lie

    def close(self) -> None:
        """End it everywhere, also in tasks and threads that have inherited it."""
        self.is_open = False
        self.results.clear()
        self.snapshots.clear()

    def __deepcopy__(self, _memo: object) -> Scope:
        """A copy holds nothing: what bears it (a cache) may go on with a copy of the model."""
        return Scope(None)

    def __reduce__(self) -> tuple[type[Scope], tuple[None]]:
        """A pickle holds nothing either."""
        return Scope, (None,)


_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("softhooks_scopes", default=())


def scope_of(model: object) -> Scope | None:
    """The innermost scope of a model that is open in this thread and task."""
    return next((scope for scope in reversed(_scopes.get()) if scope.model is model and scope.is_open), None)


@contextmanager
def entered(scope: Scope) -> Iterator[None]:
    """Hold a scope in this thread and task, without ending it after."""
    _scopes.set((*_scopes.get(), scope))
    try:
        yield
    finally:
        _scopes.set(tuple(one for one in _scopes.get() if one is not scope))


@contextmanager
def opened(model: object, is_explicit: bool = False) -> Iterator[None]:
    """Open a scope of its own, and end it after, also after an error."""
    scope = Scope(model, is_explicit)
    try:
        with entered(scope):
            yield
    finally:
        scope.close()


@contextmanager
def generating(model: object) -> Iterator[None]:
    """Open a scope for one call of `generate`; inside `softhooks.kept` that one serves."""
    outer = scope_of(model)
    if outer is not None and outer.is_explicit:
        yield
        return
    with opened(model):
        yield


_BORNE = "_softhooks_scope"


@contextmanager
def borne_by(holder: Any, model: object) -> Iterator[None]:
    """Hold the scope that lasts as long as something else: the paged cache of a continuous batch.

    Args:
        holder: has a `__dict__`; None: no scope.
    """
    if holder is None:
        yield
        return
    scope = holder.__dict__.get(_BORNE)
    if scope is None or scope.model is not model:
        scope = holder.__dict__[_BORNE] = Scope(model)
    with entered(scope):
        yield


class Memory(Generic[T]):
    """Computes what a prompt gives to one stack: once in a scope, and in each forward where none is open or a graph is built.

    Inside a scope the common changes are seen all the same: where tensors lie and in which version, what is trained by value
    (fused optimizers write without a trace in the version), which adapters of PEFT are on, autocast.

    Attributes:
        computed: how often it was computed.
    """

    def __init__(self) -> None:
        self.computed = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a new one, which has computed nothing."""
        return type(self), ()

    def recall(
        self,
        stack: Stack,
        own: Iterable[Tensor],
        base: Iterable[Tensor],
        compute: Callable[[], T],
        asked: object = None,
    ) -> T:
        """Return what `compute` gives, or gave in this scope.

        Args:
            own: the prompt's parameters and buffers.
            base: every parameter and buffer of the base that the result depends on.
            asked: what else tells one result from another.

        Raises:
            UnsupportedModeError: the rows of this forward have adapters of PEFT of their own.
        """
        own, base = list(own), list(base)
        model = None if stack.state.owner is None else stack.state.owner.model
        switched = switches(stack.module, stack.module if model is None else model) if base else ()
        scope = None if model is None else scope_of(model)
        if scope is None:
            return self._compute(compute)
        trained = [tensor for tensor in (*own, *base) if tensor.requires_grad]
        lies = None
        if not stack.module.training and not (torch.is_grad_enabled() and trained):
            lies = _place([*own, *base])
        if lies is None:
            scope.results.pop(self, None)
            return self._compute(compute)
        place = (asked, switched, *lies)
        values = [*own, *[tensor for tensor in trained if all(tensor is not one for one in own)]]
        known = scope.results.get(self)
        if known is None or known.place != place or not equal_values(values, known.values):
            value = self._compute(compute)
            known = scope.results[self] = _Result(value, place, [tensor.detach().clone() for tensor in values])
        result: T = known.value
        return result

    def _compute(self, compute: Callable[[], T]) -> T:
        self.computed += 1
        return compute()


def _place(tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """Tell where tensors lie, in which version; None if that cannot be told."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cpu")
    mode = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return (*autocast, *mode, *[(t.data_ptr(), t._version, t.dtype) for t in tensors])


def equal_values(now: list[Tensor], before: list[Tensor]) -> bool:
    """Whether two lists hold equal tensors, one by one."""
    return len(now) == len(before) and all(map(torch.equal, now, before))

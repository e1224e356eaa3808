"""Reuse a prompt's keys and values inside one `generate` call, one continuous batch, or `softhooks.kept`.

Keys and values depend on everything in the base model: weights (which may change through `.data`), hooks, attributes, replaced
modules. No check that is cheap enough for every token detects all of these changes. So each forward computes the keys and values
again, unless a scope is open. Inside a scope, nothing may change; its results are discarded when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from softhooks.backbone.stack import Stack
from softhooks.compat.peft_layers import adapter_state

T = TypeVar("T")
_COUNTING = Lock()


@dataclass
class _Result:
    """A cached result, and the values that must be unchanged for it to be reused.

    Attributes:
        key: the tensors' addresses and versions, the active PEFT adapters, torch's autocast and gradient modes, and `variant`.
        values: copies of the trained tensors, which are compared by value.
    """

    value: Any
    key: tuple[Any, ...]
    values: list[Tensor]


class ReuseScope:
    """A scope in which a model and its prompts do not change.

    Args:
        model: the model that the user passed when the first prompt was attached.
        is_explicit: whether the scope is a `softhooks.kept` block, rather than a `generate` call.
    """

    def __init__(self, model: object, is_explicit: bool = False) -> None:
        self.model = model
        self.is_explicit = is_explicit
        self.is_open = True
        self.results: dict[ResultCache[Any], _Result] = {}
        self.snapshots: dict[int, tuple[list[Any], Any]] = {}  # by prompt, with the addresses of its tensors

    def close(self) -> None:
        """End the scope, including in tasks and threads that have inherited it."""
        self.is_open = False
        self.results.clear()
        self.snapshots.clear()

    def __reduce__(self) -> tuple[type[ReuseScope], tuple[None]]:
        """Replace the scope with an empty one in copies and pickles; a copied cache may be used with a copy of the model."""
        return ReuseScope, (None,)


_scopes: ContextVar[tuple[ReuseScope, ...]] = ContextVar("softhooks_scopes", default=())


def scope_of(model: object) -> ReuseScope | None:
    """Return the innermost open scope of a model in this thread and task."""
    return next((scope for scope in reversed(_scopes.get()) if scope.model is model and scope.is_open), None)


@contextmanager
def using(scope: ReuseScope) -> Iterator[None]:
    """Use a scope in this thread and task while the `with` block runs; the scope stays open after the block."""
    _scopes.set((*_scopes.get(), scope))
    try:
        yield
    finally:
        _scopes.set(tuple(one for one in _scopes.get() if one is not scope))


@contextmanager
def new_scope(model: object, is_explicit: bool = False) -> Iterator[None]:
    """Open a scope while the `with` block runs. A `generate` call inside `softhooks.kept` uses the outer scope instead."""
    outer = scope_of(model)
    if not is_explicit and outer is not None and outer.is_explicit:
        yield
        return
    with closing(ReuseScope(model, is_explicit)) as scope, using(scope):
        yield


_SCOPE = "_softhooks_scope"


@contextmanager
def scope_on(holder: Any, model: object) -> Iterator[None]:
    """Use a scope that lives as long as another object, such as the paged cache of a continuous batch.

    Args:
        holder: any object with a `__dict__`, or None to use no scope.
    """
    if holder is None:
        yield
        return
    scope = holder.__dict__.get(_SCOPE)
    if scope is None or scope.model is not model:
        scope = holder.__dict__[_SCOPE] = ReuseScope(model)
    with using(scope):
        yield


class ResultCache(Generic[T]):
    """A prompt's keys and values for one stack, computed once per scope; outside a scope or with gradients, once per forward.

    The most common changes are detected even inside a scope: new addresses or versions of tensors, new values of trained tensors
    (fused optimizers do not increase the version), and a change of the active PEFT adapters or of autocast.

    Attributes:
        computed: the number of times that the result was computed.
    """

    def __init__(self) -> None:
        self.computed = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the cached results out of copies and pickles."""
        return type(self), ()

    def get(
        self,
        stack: Stack,
        own: Iterable[Tensor],
        base: Iterable[Tensor],
        compute: Callable[[], T],
        variant: object = None,
    ) -> T:
        """Return the result of `compute`, or the result of an earlier call in this scope.

        Args:
            own: the prompt's parameters and buffers.
            base: every parameter and buffer of the base model that the result depends on.
            variant: any other value that the result depends on.
        """
        own, base = list(own), list(base)
        model = None if stack.state.owner is None else stack.state.owner.model
        switched = adapter_state(stack.module, stack.module if model is None else model) if base else ()
        scope = None if model is None else scope_of(model)
        if scope is None:
            return self._compute(compute)
        trained = [tensor for tensor in (*own, *base) if tensor.requires_grad]
        has_graph = stack.module.training or (torch.is_grad_enabled() and trained)
        state = None if has_graph else _state([*own, *base])
        if state is None:  # a result with a graph can be used for only one backward
            scope.results.pop(self, None)
            return self._compute(compute)
        values = [*own, *[tensor for tensor in trained if all(tensor is not one for one in own)]]
        key = (variant, switched, len(values), *state)
        known = scope.results.get(self)
        if known is None or known.key != key or not all(map(torch.equal, values, known.values)):
            value = self._compute(compute)
            known = scope.results[self] = _Result(value, key, [tensor.detach().clone() for tensor in values])
        result: T = known.value
        return result

    def _compute(self, compute: Callable[[], T]) -> T:
        with _COUNTING:
            self.computed += 1
        return compute()


def _state(tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """Return the tensors' addresses and versions and torch's modes (autocast, gradients); None if a tensor has no version."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cpu")
    mode = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return (*autocast, *mode, *[(t.data_ptr(), t._version, t.dtype) for t in tensors])

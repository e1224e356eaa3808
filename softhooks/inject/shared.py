"""A front prompt of a causal decoder, run once: its keys and values serve every row.

Virtual tokens at the front see only each other, so their states are the same in every row, whatever follows. They run at batch
1, under autograd, and enter as a prefix. Without gradients the keys and values are kept until something they depend on changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from softhooks.anatomy import Site, Stack
from softhooks.inject.caches import ListeningCache
from softhooks.inject.keyvalues import KeyValues
from softhooks.inject.passes import AttentionFunction, Pass

T = TypeVar("T")


class CapturePass(Pass):
    """Run given rows through a stack, and note the keys and values that its attention sees.

    Args:
        rows: what the embedding returns, [B, P, H]; None leaves the embedding's own output.
    """

    def __init__(self, stack: Stack, rows: Tensor | None = None) -> None:
        super().__init__(stack)
        self.rows = rows
        self.keys: dict[str, dict[int, Tensor]] = {"self": {}, "cross": {}}
        self.values: dict[str, dict[int, Tensor]] = {"self": {}, "cross": {}}

    def embed(self, output: Tensor) -> Tensor:
        """Return the given rows in the place of the placeholder's."""
        return output if self.rows is None else self.rows.to(output).expand_as(output)

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note keys and values, [B, Hk, P, D], and go on."""
        self.touched = True
        self.keys[site.role][site.index] = args[2]
        self.values[site.role][site.index] = args[3]
        return attention(*args, **kwargs)


def prefill(stack: Stack, rows: Tensor, placeholder: int) -> KeyValues:
    """Run virtual tokens through a stack at batch 1.

    Args:
        rows: the prompt, [P, H].
        placeholder: an ordinary id, for what looks at ids beyond the lookup.
    """
    length = rows.shape[0]
    inputs: dict[str, Any] = {"input_ids": torch.full((1, length), placeholder, device=rows.device)}
    if stack.positions.argument:
        inputs["position_ids"] = torch.arange(length, device=rows.device)[None]
    if "use_cache" in stack.parameters:
        inputs["use_cache"] = False
    cache = ListeningCache() if stack.through == "cache" else None
    if cache is not None:
        inputs["past_key_values"] = cache
    outer, stack.live = stack.live, CapturePass(stack, rows[None])
    try:
        with _without_checkpointing(stack.module):
            stack.module(**inputs)
        if cache is not None:
            return KeyValues({i: k for i, (k, _) in cache.heard.items()}, {i: v for i, (_, v) in cache.heard.items()})
        return KeyValues(stack.live.keys["self"], stack.live.values["self"])
    finally:
        stack.live = outer


@contextmanager
def _without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Keep the few rows of a prompt out of checkpoints: their keys and values must stay in the graph."""
    layers = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in layers:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in layers:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def every_tensor(module: nn.Module) -> list[Tensor]:
    """List every parameter and buffer of a module; a shared one may come twice.

    Asked for once a token: `module.parameters()` takes five times as long, for it joins names that nobody reads.
    """
    found: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            found += part._parameters.values()
            found += part._buffers.values()
            waiting += part._modules.values()
    return [tensor for tensor in found if tensor is not None]


class Memory(Generic[T]):
    """Keys and values that are kept while nothing they depend on changes, and never under autograd.

    What is trained is compared by value: fused optimizers write to parameters without a trace in their version.
    """

    def __init__(self) -> None:
        self._place: tuple[Any, ...] | None = None
        self._values: list[Tensor] = []
        self._kept: T | None = None
        self.computed = 0

    def recall(self, stack: Stack, own: Iterable[Tensor], base: Iterable[Tensor], compute: Callable[[], T]) -> T:
        """Return what `compute` gives, or gave.

        Args:
            own: the prompt's parameters.
            base: every parameter and buffer of the base that the result depends on.
        """
        own, base = list(own), list(base)
        trained = [tensor for tensor in (*own, *base) if tensor.requires_grad]
        if stack.module.training or (torch.is_grad_enabled() and trained):
            self._kept = None
            return self._compute(compute)
        place = _place([*own, *base])
        if place is None:
            return self._compute(compute)
        values = [*own, *[tensor for tensor in trained if all(tensor is not one for one in own)]]
        if self._kept is None or place != self._place or not _equal(values, self._values):
            self._kept, self._place = self._compute(compute), place
            self._values = [tensor.detach().clone() for tensor in values]
        return self._kept

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


def _equal(now: list[Tensor], before: list[Tensor]) -> bool:
    return len(now) == len(before) and all(map(torch.equal, now, before))

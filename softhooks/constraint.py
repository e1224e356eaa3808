"""Constraints on the parameters of prompt encoders. A hook on all torch optimizers applies them after each step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches


class Constrained(Protocol):
    """A module whose parameters must stay within bounds."""

    is_constrained: ClassVar[bool]

    def constrain(self) -> None:
        """Bring the parameters back within their bounds."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters that an optimizer may update."""


_done: weakref.WeakSet[Constrained] = weakref.WeakSet()
"""The encoders that have been constrained since the Trainer's current step began."""


def _listen(patches: Patches) -> None:
    if not patches:
        patches.keep(register_optimizer_step_post_hook(_after_step))


watched: SharedPatches[Constrained] = SharedPatches(_listen)
"""The encoders to constrain. The hook is registered with the first one and removed with the last."""


def watch(encoder: Constrained) -> None:
    """Constrain an encoder after each optimizer step that updates its parameters."""
    if encoder.is_constrained:
        watched.add(encoder)


def unwatch(encoder: Constrained) -> None:
    """Stop constraining an encoder."""
    watched.discard(encoder)


def constrain(encoder: Constrained) -> None:
    """Bring an encoder's parameters back within their bounds."""
    if encoder.is_constrained:
        with torch.no_grad():
            encoder.constrain()


def begin_step(encoder: Constrained) -> None:
    """Record that the Trainer's optimizer is about to update an encoder."""
    _done.discard(encoder)


def end_step(encoder: Constrained) -> None:
    """Constrain an encoder after a Trainer's step, unless the hook on torch optimizers has already done so."""
    if encoder not in _done:
        constrain(encoder)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for encoder in watched:
        if any(id(parameter) in held for parameter in encoder.parameters()):
            constrain(encoder)
            _done.add(encoder)

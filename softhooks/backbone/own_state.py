"""Find out whether a model's forward stores state in its modules. Two threads cannot run such a model at the same time."""

from __future__ import annotations

from typing import Any

from torch import nn

from softhooks.backbone.stack import Stack

_PLAIN = (bool, int, float, str, type(None))


def changes_modules(model: nn.Module, longer: dict[str, Any], stacks: list[Stack]) -> bool:
    """Return whether forwards set attributes, parameters or buffers of modules.

    Some rotary embeddings (dynamic RoPE, LongRoPE) store the frequencies of the last text, some models the positions of images,
    and hooks of accelerate load the weights of a module for the time of its forward.

    Args:
        longer: the arguments of a forward. It has one token more than the probe forward that has already run, and that has filled
            what a model computes only once.
        stacks: the model's stacks; dynamic RoPE changes only in texts that are longer than a probe.
    """
    if any(stack.positions.dynamic_rope_length is not None for stack in stacks):
        return True
    before = _state(model)
    model(**longer)
    return any(
        name not in known or not (value is known[name] or (type(value) in _PLAIN and value == known[name]))
        for known, now in zip(before, _state(model), strict=True)
        for name, value in now.items()
    )


def _state(model: nn.Module) -> list[dict[str, Any]]:
    """Return the attributes, parameters and buffers of each module."""
    return [{**vars(module), **module._parameters, **module._buffers} for module in model.modules()]

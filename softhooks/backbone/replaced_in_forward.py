"""Refuse models that replace their own modules in a forward, as BigBird does with its block-sparse attention on short texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from softhooks.errors import UnsupportedModelError

_PLAIN = (bool, int, float, str)


@contextmanager
def kept_modules(model: nn.Module) -> Iterator[None]:
    """Run the `with` block; then put modules that the model's forwards have replaced back, and refuse the model.

    Raises:
        UnsupportedModelError: modules were replaced.
    """
    before = [(module, dict(module._modules), _plain(module)) for module in model.modules()]
    replaced: list[str] = []
    try:
        yield
    finally:
        replaced += [
            type(child).__name__
            for module, children, _ in before
            for name, child in children.items()
            if child is not None and module._modules.get(name) is not child
        ]
        for module, children, plain in before if replaced else ():
            module._modules.update(children)
            vars(module).update(plain)
    if replaced:
        raise UnsupportedModelError(
            f"{type(model).__name__} replaces some of its modules in its forward; the modules that a prompt enters must stay.",
            _remedy(model),
            replaced=", ".join(dict.fromkeys(replaced)),
        )


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that describe which modules a module has, such as BigBird's `attention_type`."""
    return {name: value for name, value in vars(module).items() if type(value) in _PLAIN}


def _remedy(model: nn.Module) -> str:
    path = next((path for path, part in model.named_modules() if hasattr(part, "set_attention_type")), None)
    if path is None:
        return "Run the model once before you attach a prompt; the modules must be replaced before that."
    owner = f"model.{path}" if path else "model"
    return f"Call `{owner}.set_attention_type('original_full')` before you attach a prompt."

"""The submodule that holds the parameters of all prompts on a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CONTAINER = "soft_prompt"
"""The name of this submodule."""


def is_prompt_key(key: str, prompt: str | None = None) -> bool:
    """Whether a key of a model's state dict belongs to the named prompt, or to any prompt if no name is given."""
    return key.startswith(f"{CONTAINER}." if prompt is None else f"{CONTAINER}.{prompt}.")


class Container(nn.ModuleDict):
    """The only submodule that softhooks adds to a model; it holds each prompt's encoder and heads under the prompt's name.

    Attributes:
        prompted_model: the state of the model's prompts; not a module, so it stays out of the state dict.
    """

    prompted_model: Any

    def _apply(self, fn: Any, recurse: bool = True) -> Container:
        """Move the prompts to another device, but keep their dtype: they are the fp32 master weights."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

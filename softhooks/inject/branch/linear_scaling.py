"""A trained factor and offset on the output of every linear layer, applied by hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError

Scaled = dict[str, tuple[Tensor, Tensor]]
"""Factor and offset of linear layers by name, [R, out] each; R is 1 (shared by every row) or B."""


def linears(stack: Stack) -> dict[str, tuple[nn.Module, int]]:
    """Every linear layer in the blocks of a stack, by name, with the width of its output; the factors of LoRA do not count."""
    from transformers.pytorch_utils import Conv1D

    blocks = {name for name, module in stack.module.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, module in stack.module.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if inside and isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name:
            found[name] = module, module.out_features if isinstance(module, nn.Linear) else module.nf
    return found


def blanks(mask: Tensor | None, columns: int) -> Tensor | None:
    """The columns of a text that are padding, if any row begins with padding; else None.

    Recurrent layers read every column, and skip padding because its states are 0: no offset may be added to them.

    Args:
        mask: one number a column, [B, past + T].
        columns: T.

    Shape:
        -> [B, T] bool
    """
    if mask is None or columns == 1 or not bool((mask[:, -columns:].long().diff(dim=1) > 0).any()):
        return None
    return mask[:, -columns:] == 0


def scale(scaled: Scaled, name: str, output: Tensor, blank: Tensor | None = None) -> Tensor | None:
    """Multiply the output of a linear layer by its factor and add its offset; None for a layer without them.

    Args:
        blank: the columns that get no offset, [B, T] bool.

    Shape:
        output [B, ..., out], or [N, out] where all rows share one factor

    Raises:
        UnsupportedModeError: rows differ, and the output has not one entry a row.
    """
    if name not in scaled:
        return None
    factor, offset = (part.to(output) for part in scaled[name])
    rows = factor.shape[0]
    if rows > 1 and output.shape[0] != rows:
        raise UnsupportedModeError(
            f"layer {name} returns {list(output.shape)} for {rows} rows with different prompts; prompts that scale linear layers "
            "share a batch only where every layer keeps the rows apart.",
            "Run the rows of each prompt in a batch of their own.",
        )
    shape = (rows, *[1] * (output.dim() - 2), -1) if rows > 1 else (-1,)
    offset = offset.view(shape)
    if blank is not None and output.dim() > 2 and output.shape[:2] == blank.shape:
        offset = offset.masked_fill(blank.to(output.device).view(*blank.shape, *[1] * (output.dim() - 2)), 0.0)
    return output * factor.view(shape) + offset


class ScaleHook:
    """The hook of one linear layer; the running pass has its factor."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.stack = stack
        self.name = name

    def scale(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Scale the output, if a pass is running."""
        return None if self.stack.state.current is None else self.stack.state.current.scale(self.name, output)


def hook_linears(stack: Stack) -> list[RemovableHandle]:
    """Hook every linear layer of a stack that has no such hook yet, and return the handles."""
    handles = []
    for name, (module, _) in linears(stack).items():
        if not any(isinstance(getattr(hook, "__self__", None), ScaleHook) for hook in module._forward_hooks.values()):
            handles.append(module.register_forward_hook(ScaleHook(stack, name).scale))
    return handles

"""A trained factor and offset for the output of every linear layer, applied by hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError

Scaled = dict[str, tuple[Tensor, Tensor]]
"""The factor and the offset of each linear layer, by the layer's name, [R, out] each; R is 1 (shared by every row) or B."""


def linears(stack: Stack) -> dict[str, tuple[nn.Module, int]]:
    """Map the name of each linear layer in a stack's blocks, except those of LoRA, to the layer and its output width."""
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(f"{name}." for name, module in stack.module.named_modules() if isinstance(module, nn.ModuleList))
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, module in stack.module.named_modules():
        if name.startswith(blocks) and isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name:
            found[name] = module, module.out_features if isinstance(module, nn.Linear) else module.nf
    return found


def blanks(mask: Tensor | None, columns: int) -> Tensor | None:
    """Return a mask that is True where the text is padding, [B, T] bool, or None if no row starts with padding.

    Recurrent layers ignore a padding token only if its hidden state is 0, so no offset may be added to it.

    Args:
        mask: the attention mask, [B, past + T].
        columns: the length of the text, including padding, T.
    """
    if mask is None or columns == 1 or not bool((mask[:, -columns:].long().diff(dim=1) > 0).any()):
        return None
    return mask[:, -columns:] == 0


def scale(scaled: Scaled, name: str, output: Tensor, blank: Tensor | None = None) -> Tensor | None:
    """Multiply the output of a linear layer by its factor and add its offset; return None if the layer has neither.

    Args:
        output: [B, ..., out], or [N, out] if all rows share one factor.
        blank: True where the text is padding, which gets no offset, [B, T] bool.
    """
    if name not in scaled:
        return None
    factor, offset = (part.to(output) for part in scaled[name])
    rows = factor.shape[0]
    if rows > 1 and output.shape[0] != rows:
        raise UnsupportedModeError(
            f"the output of layer {name} has the shape {list(output.shape)} in a batch of {rows} rows with different prompts; "
            "prompts that scale linear layers can share a batch only if every layer's output has one entry per row.",
            "Run the rows of each prompt in a separate batch.",
        )
    shape = (rows, *[1] * (output.dim() - 2), -1) if rows > 1 else (-1,)
    offset = offset.view(shape)
    if blank is not None and output.dim() > 2 and output.shape[:2] == blank.shape:
        offset = offset.masked_fill(blank.to(output.device).view(*blank.shape, *[1] * (output.dim() - 2)), 0.0)
    return output * factor.view(shape) + offset


def scale_tokens(scaled: Scaled, name: str, output: Tensor) -> Tensor | None:
    """Multiply the output of a linear layer, [1, T, out] or [T, out], by a factor for each token, and add its offset."""
    if name not in scaled:
        return None
    factor, offset = (part.to(output) for part in scaled[name])
    if output.shape[-2] != len(factor):
        raise UnsupportedModeError(
            f"the output of layer {name} has the shape {list(output.shape)} for {len(factor)} tokens; prompts that scale linear "
            "layers can share a continuous batch only if every layer's output has one entry per token.",
            "Use one prompt for all requests of a manager.",
        )
    return output * factor + offset


@dataclass(eq=False)
class ScaleHook:
    """The hook of one linear layer. As a bound method and not a closure, it is copied together with the model."""

    stack: Stack
    name: str

    def scale(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Scale the output, if a forward of the stack is running."""
        current = self.stack.state.current
        return None if current is None else current.scale(self.name, output)


def hook_linears(stack: Stack) -> list[RemovableHandle]:
    """Register a `ScaleHook` on each linear layer that does not have one, and return the handles."""
    handles = []
    for name, (module, _) in linears(stack).items():
        if not any(isinstance(getattr(hook, "__self__", None), ScaleHook) for hook in module._forward_hooks.values()):
            handles.append(module.register_forward_hook(ScaleHook(stack, name).scale))
    return handles

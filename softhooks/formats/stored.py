"""A saved prompt as plain data: its method, options and tensors, and the known properties of its base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.stack import ModelStructure, Role, Stack
from softhooks.base_model.info import BaseModelInfo
from softhooks.base_model.same_base import OVERRIDE, require_base
from softhooks.errors import CheckpointError
from softhooks.formats.hub_commit import HubCommit
from softhooks.formats.labels import Labels

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 2**22  # numbers


@dataclass
class StoredPrompt:
    """The content of a prompt's file. `softhooks.methods.stored_method` finds the method and checks the options.

    Attributes:
        kind: the kind of the method, such as `prompt_tuning`.
        options: the method's options as JSON values; not checked here.
        tables: the tensors of the folded prompt, by name, such as `embeddings`.
        heads: the state dicts of the heads, by path.
        conventions: the prompt's assumptions about the forward pass, such as its placement; not checked here.
        source: the file, or another name for it in error messages.
        stacks: the `outline` of the base model, as far as it is known.
        base: other properties of the base model, as far as they are known.
        also_trained: the names of base parameters that were trained with the prompt; their values are not in the file.
        adapter_layers: the layers of a LLaMA-Adapter in PEFT's format; empty for any other prompt.
        labels: the label names of the heads, or None if unknown.
        added: the trained rows of added tokens, by name.
        added_ids: the ids of these tokens.
        loaded_from: the commit on the Hub that this prompt, or the prompt that it was trained from, was loaded from.
    """

    kind: str
    options: dict[str, Any]
    tables: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    conventions: dict[str, Any]
    source: str
    stacks: dict[str, dict[str, Any]]
    base: BaseModelInfo = field(default_factory=BaseModelInfo)
    also_trained: list[str] = field(default_factory=list)
    adapter_layers: tuple[int, ...] = ()
    labels: Labels | None = None
    added: dict[str, Tensor] = field(default_factory=dict)
    added_ids: tuple[int, ...] = ()
    loaded_from: HubCommit | None = None

    def require_finite(self) -> None:
        """Raise a `CheckpointError` if a tensor is empty, contains infinite numbers or NaN, or is not floating-point."""
        heads = {f"{path}:{name}": tensor for path, head in self.heads.items() for name, tensor in head.items()}
        for name, tensor in {**self.tables, **self.added, **heads}.items():
            if not tensor.numel():  # its other dimensions could have any size
                raise CheckpointError(f"the tensor {name!r} is empty.", "Save the prompt again.", file=self.source)
            is_float = tensor.dtype in _FLOATS
            if not is_float or not _is_finite(tensor):
                raise CheckpointError(
                    f"the tensor {name!r} contains {'inf or NaN' if is_float else tensor.dtype}; it must contain finite floats.",
                    "Use a checkpoint from before the training diverged.",
                    file=self.source,
                )

    def require_base(self, model: nn.Module, structure: ModelStructure, override: str = OVERRIDE) -> None:
        """Raise a `PromptMismatchError`, whose last remedy is `override`, if a model is not the base model."""
        has_adapters = any("lora_" in name for name in self.also_trained)
        require_base(self.base, model, structure, self.source, has_adapters=has_adapters, override=override)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite; the tensor is read in parts, so that this takes little memory."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(_CHUNK))


def outline(structure: ModelStructure) -> dict[str, dict[str, Any]]:
    """Describe the stacks of a model as JSON values.

    Returns:
        for each stack, whether it is causal and, for `self` and `cross` attention, one list for each run of consecutive layers
        with the same attention shape: `[layers, heads, key size, value size]`.
    """
    return {stack.name: {"causal": stack.causal, **_attention_shapes(stack)} for stack in structure.stacks}


def _attention_shapes(stack: Stack) -> dict[str, list[list[int]]]:
    roles: list[Role] = ["self", "cross"]
    shapes = {role: [[s.heads, s.key_dim, s.value_dim] for s in stack.sites_of(role)] for role in roles}
    return {role: [[len(list(run)), *shape] for shape, run in groupby(shapes[role])] for role in roles}


def on_one_line(stacks: dict[str, dict[str, Any]]) -> str:
    """Format an outline for error messages."""
    return ", ".join(" ".join([name, *[f"{k}={v}" for k, v in stack.items()]]) for name, stack in stacks.items())

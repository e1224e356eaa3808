"""Trained heads: each prompt trains its own copy of the model's head, which is used while the prompt is active.

The model's own head stays frozen and is used again once the prompt is removed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.container import CONTAINER
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.offload import device_of, read_tensor, without_accelerate_hooks
from softhooks.errors import PromptMismatchError

HEAD_NAMES = ("score", "classifier", "qa_outputs", "classification_head", "pre_classifier")
"""The names of the heads that transformers newly initializes for a task; language model heads are pretrained."""


def can_generate(model: nn.Module) -> bool:
    """Whether a model supports `generate`."""
    method = getattr(model, "can_generate", None)
    return method is not None and bool(method())


def is_causal_lm(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether a model is a decoder-only language model."""
    stack = structure.entry
    return stack.name == "text" and stack.causal and can_generate(model)


def find_heads(model: nn.Module, structure: ModelStructure) -> dict[str, nn.Module]:
    """Return the newly initialized heads of a task model, keyed by path, including a pooler next to a classifier (DeBERTa)."""
    inside = {id(module) for stack in structure.stacks for module in stack.module.modules()}
    prompts = model._modules.get(CONTAINER)
    inside |= {id(module) for module in prompts.modules()} if prompts is not None else set()
    heads: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        is_nested = any(path.startswith(f"{other}.") for other in heads)
        parent, _, name = path.rpartition(".")
        is_head = name in HEAD_NAMES or (name == "pooler" and hasattr(model.get_submodule(parent), "classifier"))
        if is_head and id(module) not in inside and not is_nested:
            heads[path] = module
    return heads


def active_head(head: nn.Module) -> nn.Module:
    """Return the head in use: the active adapter's copy if PEFT has wrapped the model's head, otherwise the head itself."""
    copies = head._modules.get("modules_to_save")
    active = getattr(head, "active_adapters", None)
    if isinstance(copies, nn.ModuleDict) and active and active[0] in copies:
        return copies[active[0]]
    return head


def copy_heads(heads: dict[str, nn.Module]) -> nn.ModuleDict:
    """Copy heads for a prompt, in fp32 and on the same devices. In the names of the copies, slashes replace the dots of paths."""
    copies = nn.ModuleDict()
    for path, head in heads.items():
        head = active_head(head)
        copies[path.replace(".", "/")] = _copy(head).float().to(device_of(head)).requires_grad_(True)
    return copies


def _copy(head: nn.Module) -> nn.Module:
    """Copy a head with its weights, even if they are offloaded, but without its hooks, which refer to the whole model."""
    with without_accelerate_hooks(head):
        own = copy.deepcopy(head, {id(head._forward_hooks): OrderedDict()})
    if any(parameter.is_meta for parameter in own.parameters()):
        weights = {name: read_tensor(head, name, value) for name, value in head.state_dict().items()}
        own.load_state_dict(weights, assign=True)
    return own


def run_head(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor) -> Tensor:
    """Run a prompt's head in fp32, and return its output in the dtype of `like`."""

    def to_fp32(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    result: Tensor = head(*map(to_fp32, args), **{name: to_fp32(value) for name, value in kwargs.items()})
    return result.to(like.dtype)


def run_heads_by_row(
    heads: Sequence[nn.Module | None],
    rows: Sequence[int | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    base: Tensor,
) -> Tensor:
    """Compute each row's output with the head of its prompt.

    Args:
        heads: the heads of the prompts, with None for a prompt without a head.
        rows: the index of each row's prompt, or None for a row without a prompt.
        base: the output of the model's own head; rows without a prompt, or whose prompt has no head, keep it.
    """
    result = base
    for number, head in enumerate(heads):
        chosen = torch.tensor([row == number for row in rows], device=base.device)
        if head is not None and bool(chosen.any()):
            own = run_head(head, args, kwargs, base)
            result = torch.where(chosen.view(-1, *[1] * (base.dim() - 1)), own, result)
    return result


def load_heads(own: nn.ModuleDict, states: dict[str, dict[str, Tensor]], source: str) -> None:
    """Load saved heads into a prompt's copies; raise a `PromptMismatchError` if the model lacks one or its shapes differ."""
    for path, state in states.items():
        key = path.replace(".", "/")
        head = own[key] if key in own else None  # noqa: SIM401 - a ModuleDict has no get
        expected = {} if head is None else {name: list(value.shape) for name, value in head.state_dict().items()}
        found = {name: list(value.shape) for name, value in state.items()}
        if head is None or expected != found:
            raise PromptMismatchError(
                f"the prompt's trained head `{path}` does not fit the model.",
                "Load the base model with the task class and the number of labels used in training.",
                prompt=f"{path}: {found} ({source})",
                model=f"{path}: {expected or 'no such head'}",
            )
        head.load_state_dict(state)

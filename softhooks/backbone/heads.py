"""Trained heads: each prompt owns a copy of the model's head, which answers while the prompt is on.

The model's own head is frozen like everything else, so that detaching gives it back as it was, and so that every prompt on a
model can have its own.
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
from softhooks.compat.offload import device_of, read, unhooked
from softhooks.errors import PromptMismatchError

HEAD_NAMES = ("score", "classifier", "qa_outputs", "classification_head", "pre_classifier")
"""The names of the heads that transformers makes anew for a task. Language-model heads are not among them."""


def can_generate(model: nn.Module) -> bool:
    """Whether `generate` runs on a model."""
    method = getattr(model, "can_generate", None)
    return method is not None and bool(method())


def is_causal_lm(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether a model is a causal language model, whose logits predict the next token."""
    stack = structure.entry
    return stack.name == "text" and stack.causal and can_generate(model)


def find_heads(model: nn.Module, structure: ModelStructure) -> dict[str, nn.Module]:
    """Find the new heads of a task model, by path; what lies inside a stack, or belongs to a prompt, is no head.

    A pooler beside a classifier is new too: DeBERTa pools outside its stack.
    """
    inside = {id(module) for stack in structure.stacks for module in stack.module.modules()}
    prompts = model._modules.get(CONTAINER)
    inside |= {id(module) for module in prompts.modules()} if prompts is not None else set()
    heads: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{other}.") for other in heads)
        parent, _, name = path.rpartition(".")
        is_new = name in HEAD_NAMES or (name == "pooler" and hasattr(model.get_submodule(parent), "classifier"))
        if is_new and id(module) not in inside and not nested:
            heads[path] = module
    return heads


def worn(head: nn.Module) -> nn.Module:
    """The module that answers for a head: PEFT keeps the model's own and its adapters' in a wrapper."""
    kept = head._modules.get("modules_to_save")
    active = getattr(head, "active_adapters", None)
    if isinstance(kept, nn.ModuleDict) and active and active[0] in kept:
        return kept[active[0]]
    return head


def copy_heads(heads: dict[str, nn.Module]) -> nn.ModuleDict:
    """Copy heads into a module of the prompt's own, in fp32, where each computes; a path's dots become slashes."""
    copies = nn.ModuleDict()
    for path, head in heads.items():
        own = _copy(worn(head))
        copies[path.replace(".", "/")] = own.float().to(device_of(worn(head))).requires_grad_(True)
    return copies


def _copy(head: nn.Module) -> nn.Module:
    """Copy a head with its weights, also where accelerate keeps them elsewhere.

    Its hooks are left out: those of other prompts on the model hold it, and the whole model would be copied with them.
    """
    with unhooked(head):
        own = copy.deepcopy(head, {id(head._forward_hooks): OrderedDict()})
    if any(parameter.is_meta for parameter in own.parameters()):
        own.load_state_dict({name: read(head, name, value) for name, value in head.state_dict().items()}, assign=True)
    return own


def answer(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor) -> Tensor:
    """Run a prompt's head in its own precision; the result has the precision that the model's head gave."""

    def own(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    result: Tensor = head(*[own(arg) for arg in args], **{key: own(value) for key, value in kwargs.items()})
    return result.to(like.dtype)


def answer_rows(
    heads: Sequence[nn.Module | None],
    rows: Sequence[int | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    base: Tensor,
) -> Tensor:
    """Give each row of a batch the answer of its own prompt's head; a row without one keeps the model's."""
    result = base
    for number, head in enumerate(heads):
        chosen = torch.tensor([row == number for row in rows], device=base.device)
        if head is not None and bool(chosen.any()):
            own = answer(head, args, kwargs, base)
            result = torch.where(chosen.view(-1, *[1] * (base.dim() - 1)), own, result)
    return result


def check_heads(own: nn.ModuleDict, states: dict[str, dict[str, Tensor]], source: str) -> None:
    """Put saved heads into a prompt's copies.

    Raises:
        PromptMismatchError: the model lacks a head, or its shape is another.
    """
    for path, state in states.items():
        key = path.replace(".", "/")
        head = own[key] if key in own else None  # noqa: SIM401 - a ModuleDict has no get
        expected = {} if head is None else {name: list(value.shape) for name, value in head.state_dict().items()}
        found = {name: list(value.shape) for name, value in state.items()}
        if head is None or expected != found:
            raise PromptMismatchError(
                "a prompt's trained head must fit the head of the model.",
                "Load the base with the same task class and number of labels.",
                prompt=f"{path}: {found} ({source})",
                model=f"{path}: {expected or 'no such head'}",
            )
        head.load_state_dict(state)

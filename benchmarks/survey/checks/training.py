"""Gradients: to every part of the prompt, to nothing of the base, and the same with activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.survey.check import ROUNDING, Bare, Check, Subject
from benchmarks.survey.modality import gap, output_of


def _backward(model: Any, call: dict[str, Any]) -> None:
    model.zero_grad()
    output_of(model(**call)).float().pow(2).sum().backward()


def _gradients(subject: Subject, _: Any) -> Iterator[str]:
    """A column of a prefix belongs to one number of one layer's keys or values: a layer that the prefix does not reach shows."""
    assert subject.prompt is not None
    _backward(subject.model, subject.example.call())
    unread = _unread(subject)
    for name, parameter in subject.prompt.encoder.named_parameters():
        columns = 0 if parameter.grad is None else int(parameter.grad.flatten(0, -2).any(0).sum())
        if columns < parameter.shape[-1] - unread:
            yield f"{name}: {columns} of {parameter.shape[-1]} columns have a gradient"
    for name, parameter in subject.prompt.named_parameters():
        if parameter.grad is None:
            yield f"{name} has no gradient"
    for name, parameter in subject.model.named_parameters():
        if parameter.grad is not None and not name.startswith("soft_prompt."):
            yield f"{name} of the base has a gradient"
    subject.model.zero_grad()


def _unread(subject: Subject) -> int:
    """The number of a prefix's columns that reach no output: LiLT's last layer computes layout states that nothing reads."""
    ratio = getattr(subject.model.config, "channel_shrink_ratio", None)
    is_written_out = subject.prompt is not None and subject.prompt.injection == "written_out"
    return int(subject.model.config.hidden_size // ratio) if ratio is not None and is_written_out else 0


def _trained(model: Any, call: dict[str, Any], checkpointing: bool) -> Tensor:
    """The gradients of all that is trained, in training mode; a model that has no dropout computes as in evaluation mode."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        model.train()
        torch.manual_seed(0)
        _backward(model, call)
        found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return torch.cat(found).clone()
    finally:
        model.eval()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_disable()
            for hook in getattr(model, "_require_grads_hooks", ()):  # which transformers leaves behind
                hook.remove()


def _can_checkpoint(bare: Bare) -> Any:
    """Whether the bare model trains alike with and without it; BatchNorm would change its buffers."""
    model, call = bare.model, bare.example.call()
    if not model.supports_gradient_checkpointing or any(isinstance(part, _BatchNorm) for part in model.modules()):
        return None
    plain, remade = (_trained(model, call, checkpointing) for checkpointing in (False, True))
    return True if gap(remade, plain) <= ROUNDING else None


def _checkpointing(subject: Subject, _: Any) -> Iterator[str]:
    call = subject.example.call()
    plain, remade = (_trained(subject.model, call, checkpointing) for checkpointing in (False, True))
    moved = gap(remade, plain)
    if moved > ROUNDING:
        yield f"the gradients differ by {moved:.1g}"


CHECKS = (
    Check("gradients", "every part of the prompt has a gradient, and nothing of the base", _gradients),
    Check(
        "checkpointing",
        "activation checkpointing does not change the gradients",
        _checkpointing,
        _can_checkpoint,
        asks_again=False,  # a frozen model has no gradients
    ),
)

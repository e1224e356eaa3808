"""The base: closed gates leave it as it is, and removal, or a refusal, leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.survey.check import Bare, Check, Subject
from benchmarks.survey.modality import gap


def _closed(subject: Subject, _: Any) -> Iterator[str]:
    if (moved := gap(subject.answer(), subject.bare.output)) > 1e-5:
        yield f"with closed gates the output differs by {moved:.1g} from that of the bare model"


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that a prompt might leave in a model, by name."""
    state: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = tensor.detach().clone()
        state[f"{name} requires_grad"] = tensor.requires_grad
    for name, module in model.named_modules():
        hooks = [value for key, value in vars(module).items() if key.endswith(("_hooks", "_pre_hooks"))]
        state[f"hooks of {name}"] = [len(value) for value in hooks]
        state[f"attributes of {name}"] = sorted(vars(module))
        state[f"training of {name}"] = module.training
    return state


def _removal(subject: Subject, before: dict[str, Any]) -> Iterator[str]:
    after = _state(subject.model)
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        same = torch.equal(old, new) if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) else old == new
        if not same:
            yield f"{name} is another than before"
    if not torch.equal(subject.answer(), subject.bare.output):
        yield "the output is another than before"


def _before(bare: Bare) -> dict[str, Any]:
    return _state(bare.model)


CHECKS = (
    Check("closed gates", "an adapter starts as the bare model", _closed, kinds=("adapter",), phase="fresh"),
    Check(
        "removal",
        "after removal, or a refusal, parameters, buffers, hooks and output are those from before, bit for bit",
        _removal,
        _before,
        phase="removed",
    ),
)

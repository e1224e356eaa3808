"""Refuse settings under which DDP hangs or misses gradients if a step does not use all parameters.

Zero gradients for unused parameters would not help, because momentum and weight decay would still change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from softhooks.errors import TrainerError
from softhooks.runtime.attached_prompt import AttachedPrompt


def require_unused_search(prompts: Iterable[AttachedPrompt], given: Mapping[str, Tensor]) -> None:
    """Refuse a training forward that does not use all parameters, unless DDP searches for unused parameters in each step.

    Args:
        prompts: the prompts that are trained.
        given: the extra arguments of the forward.
    """
    wrapper: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)  # the wrapper whose forward is running
    if wrapper is None or not wrapper.training or (wrapper.find_unused_parameters and not wrapper.static_graph):
        return
    for prompt in prompts:
        if prompt.method.has_unused_parameters(given):
            found = f"find_unused_parameters={wrapper.find_unused_parameters}, static_graph={wrapper.static_graph}"
            raise unused_parameters_error(prompt.method.kind, found)


def unused_parameters_error(method: str, found: str) -> TrainerError:
    """Return the error for a method that leaves parameters unused; `found` names the DDP settings."""
    return TrainerError(
        f"{found}, but some parameters of {method} are unused in some steps; DDP must search for these in each step.",
        "Set `find_unused_parameters=True`, even with gradient checkpointing, and leave `static_graph` off: "
        "`ddp_find_unused_parameters=True` in TrainingArguments, `DistributedDataParallelKwargs` for an Accelerator.",
    )

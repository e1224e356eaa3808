"""Refuse DDP settings under which DDP hangs or misses gradients if a step leaves some parameters unused.

Zero gradients for unused parameters would not be a solution: an optimizer's momentum and weight decay would change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from softhooks.errors import TrainerError

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt


def require_unused_search(prompts: Iterable[AttachedPrompt], given: Mapping[str, Tensor]) -> None:
    """Refuse a training forward under DDP settings that make the next step fail or miss gradients.

    Args:
        prompts: the prompts that train in this forward.
        given: the extra arguments of the forward.

    Raises:
        TrainerError: DDP has such settings; the error names the method.
    """
    wrapper: Any = getattr(
        DistributedDataParallel, "_active_ddp_module", None
    )  # the DDP wrapper that is in its forward
    if wrapper is None or not wrapper.training or (wrapper.find_unused_parameters and not wrapper.static_graph):
        return
    for prompt in prompts:
        if prompt.method.has_unused_parameters(given):
            found = f"find_unused_parameters={wrapper.find_unused_parameters}, static_graph={wrapper.static_graph}"
            raise unused_parameters_error(prompt.method.kind, found)


def unused_parameters_error(method: str, found: str) -> TrainerError:
    """Return the error for a launch or a forward with such DDP settings.

    Args:
        method: the kind of the method.
        found: the settings, as a clause.
    """
    return TrainerError(
        f"{found}, but some parameters of {method} are unused in some steps; DDP must look for them in each step.",
        "Set `find_unused_parameters=True`, even with gradient checkpointing, and leave `static_graph` off: "
        "`ddp_find_unused_parameters=True` in TrainingArguments, `DistributedDataParallelKwargs` for an Accelerator.",
    )

"""Parameters that have no part in a step: under DDP, a wrapper that does not look for them waits for their gradients for ever.

Their loss must not be given a gradient of zeros instead: an optimizer's momentum and decay would move them by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from softhooks.errors import TrainerError

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt

RULE = "where parameters have no part in some steps, DDP must look for them in each, and not take the steps for alike."
REMEDY = (
    "Set `find_unused_parameters=True`, also with layers that run again (gradient checkpointing), and leave `static_graph` off: "
    "`ddp_find_unused_parameters=True` in TrainingArguments, `DistributedDataParallelKwargs` for an Accelerator."
)


def require_search(prompts: Iterable[AttachedPrompt], given: Mapping[str, Tensor]) -> None:
    """Refuse a training forward under a DDP that would fail at the next, or train on part of the gradients.

    Args:
        prompts: those that train in this forward.
        given: the extra arguments of the forward.

    Raises:
        TrainerError: naming the method.
    """
    wrapper: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)  # the one whose forward is under way
    if wrapper is None or not wrapper.training or (wrapper.find_unused_parameters and not wrapper.static_graph):
        return
    for prompt in prompts:
        if prompt.method.has_idle(given):
            found = f"find_unused_parameters={wrapper.find_unused_parameters}, static_graph={wrapper.static_graph}"
            raise TrainerError(RULE, REMEDY, method=prompt.method.kind, found=found)

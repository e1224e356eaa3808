"""A prompt's metrics in the Trainer's logs.

The Trainer calls its reporters before the user's callbacks, so metrics that a callback adds in `on_log` never reach TensorBoard,
W&B or MLflow. `CallbackHandler.on_log` is therefore wrapped to add the metrics first, as long as a callback's prompt is attached.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler

from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of


class LoggedMetrics:
    """A handle that adds a saver's metrics to the logs of its model's Trainer until `remove` is called."""

    def __init__(self, saver: CheckpointSaver) -> None:
        self._saver = weakref.ref(saver)
        users.add(saver)

    def remove(self) -> None:
        """Stop logging the metrics. Calling it again does nothing."""
        saver = self._saver()
        if saver is not None:
            users.discard(saver)


def _with_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        """Add the metrics to a training log and to the copy of it that the Trainer has put in `log_history`."""
        prompted = prompted_model_of(handler.model) if isinstance(handler.model, nn.Module) else None
        saver = None if prompted is None else saver_of(prompted.model)
        if saver is not None and saver.metrics is not None and "loss" in logs:
            metrics = saver.metrics.compute()
            logs.update(metrics)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(metrics)
        return original(handler, args, state, control, logs, **kwargs)

    return on_log


def _wrap_on_log(patches: Patches) -> None:
    patches.wrap(CallbackHandler, "on_log", _with_metrics)


users: SharedPatches[CheckpointSaver] = SharedPatches(_wrap_on_log)
"""The savers whose metrics are logged."""

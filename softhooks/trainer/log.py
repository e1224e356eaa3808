"""What a prompt shows of itself while it trains: numbers in every training log, for whoever reads it.

The Trainer tells its reporters before a user's callbacks, so what a callback adds in `on_log` never reaches TensorBoard, W&B or
MLflow. `CallbackHandler.on_log` is therefore wrapped while a callback's prompt is on any model, lets the prompt of the handler's
model add its numbers first, and is put back with the last one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import CallbackHandler

from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.prompt import SoftPrompt
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import Saver, saver_of

PREFIX = "soft_prompt"


class Watch:
    """The numbers of a prompt in training; nothing is computed until somebody logs.

    Args:
        prompt: the prompt, where it starts.
    """

    def __init__(self, prompt: SoftPrompt) -> None:
        self.prompt = prompt
        self._start = self._tables()
        self._gradients: list[Tensor] = []

    def note_gradients(self) -> None:
        """Hold on to the gradients that the optimizer will use; the Trainer lets go of them before it logs."""
        self._gradients = [p.grad for p in self.prompt.encoder.parameters() if p.grad is not None]

    def metrics(self) -> dict[str, float]:
        """The prompt's norm, its gradient's after clipping, its distance from the start, and what its encoder adds.

        A prompt whose parameters are sharded over processes shows nothing: to compute with it is everybody's affair.
        """
        now = self._tables()
        if not now:
            return {}
        moved = [table - self._start[group].to(table) for group, table in now.items() if group in self._start]
        numbers = {"norm": _norm(list(now.values())), "distance": _norm(moved)}
        if self._gradients:
            numbers["grad_norm"] = _norm(self._gradients)
        values = torch.stack(list(numbers.values())).tolist()
        found = dict(zip(numbers, values, strict=True)) | self.prompt.encoder.metrics()
        return {f"{PREFIX}/{name}": float(value) for name, value in found.items()}

    def _tables(self) -> dict[str, Tensor]:
        encoder = self.prompt.encoder
        if any(hasattr(parameter, "full_tensor") for parameter in encoder.parameters()):
            return {}
        return encoder.folded()


def _norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers together, in fp32."""
    norms = [torch.linalg.vector_norm(tensor.detach().float()) for tensor in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


# --- before the reporters ---------------------------------------------------------------------------------------------


class Showing:
    """The numbers of a prompt in the logs of the Trainer that trains its model, until it is removed.

    Args:
        saver: what a callback keeps on the model; it has the numbers.
    """

    def __init__(self, saver: Saver) -> None:
        self._saver = weakref.ref(saver)
        users.add(saver)

    def remove(self) -> None:
        """Show them no more. Calling it again does nothing."""
        saver = self._saver()
        if saver is not None:
            users.discard(saver)


def _with_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_log(handler: Any, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        """Add the prompt's numbers to a training log, also to the copy that the Trainer has kept of it."""
        prompted = prompted_model_of(handler.model) if isinstance(handler.model, nn.Module) else None
        saver = None if prompted is None else saver_of(prompted.model)
        if saver is not None and saver.watch is not None and "loss" in logs:
            found = saver.watch.metrics()
            logs.update(found)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(found)
        return original(handler, args, state, control, logs, **kwargs)

    return on_log


def _wrap_on_log(patches: Patches) -> None:
    patches.wrap(CallbackHandler, "on_log", _with_metrics)


users: SharedPatches[Saver] = SharedPatches(_wrap_on_log)
"""What callbacks keep on the models whose numbers are shown."""

"""A prompt that goes on training, as a state dict: for frameworks whose checkpoints are made of objects with one.

A framework that asks its objects for `state_dict` and hands it back to `load_state_dict` (Ignite, skorch, Composer, ...) keeps
with a `LivePrompt` what a Trainer's checkpoint keeps: the live parameters, and a description by which another run is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from softhooks.errors import TrainerError
from softhooks.integration_support.checkpoints import CONTAINER, CheckpointSaver, saver_of
from softhooks.integration_support.training import FrozenReport, is_mended, require_gradient, require_trainable_prompt
from softhooks.prompt import SoftPrompt


class LivePrompt:
    """What a framework's checkpoint holds of a prompt that trains, in the place of its model.

    While it is there, the model's `save_pretrained` writes the prompt only.

    Args:
        prompt: the prompt, attached.
        optimizer: what trains the prompt and nothing else; its class is kept in the description, so that another one does not
            take the state up. None: neither checked nor kept.

    Attributes:
        prompt: the same.
        report: what the last check of the base has read.

    Raises:
        NotAttachedError: the prompt has been removed.
        TrainerError: the prompt has nothing to train, the optimizer trains something else, or something else saves its model.
    """

    def __init__(self, prompt: SoftPrompt, optimizer: Any = None) -> None:
        prompt._require_attached()
        require_trainable_prompt(prompt)
        present = saver_of(prompt.model)
        if present is not None and present.prompt is not prompt and present.prompt.is_attached:
            raise TrainerError(
                "the checkpoints of a model hold one prompt.",
                "Remove the other prompt, or attach this one to a model of its own.",
                kept=repr(present.prompt.name),
                asked=repr(prompt.name),
            )
        if optimizer is not None:
            require_optimizer(prompt, optimizer)
        self.prompt = prompt
        self.report: FrozenReport | None = None
        self._saver = CheckpointSaver(prompt, self)
        self._saver.optimizer = None if optimizer is None else type(optimizer).__name__

    def state_dict(self) -> dict[str, Tensor]:
        """The live parameters by their names in the model, and a description; tensors only, so that any format holds them.

        Raises:
            NotAttachedError: the prompt has been removed.
        """
        self.prompt._require_attached()
        return {name: tensor.detach() for name, tensor in self._saver.state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Bring back what `state_dict` gave; nothing is loaded where anything differs.

        Args:
            state_dict: what `state_dict` gave.
            strict: for callers that pass it on; what is trained must be there anyway.

        Raises:
            NotAttachedError: the prompt has been removed.
            TrainerError: it is of another prompt, method, base or optimizer, or holds no prompt.
        """
        self.prompt._require_attached()
        if not all(isinstance(value, Tensor) for value in state_dict.values()):
            kinds = sorted({type(value).__name__ for value in state_dict.values()})
            raise TrainerError(f"the state of a prompt must hold tensors by name; this one holds {', '.join(kinds)}.")
        state = dict(state_dict)
        self._saver.check(state)
        if not self._saver.loaded:
            raise TrainerError(
                "a run that goes on must find its prompt in the checkpoint.",
                "Load a checkpoint that was written with the prompt among its objects, under the same name.",
                expected=f"{CONTAINER}.{self.prompt.name}.*",
                found=", ".join(sorted(state)[:3]) or "nothing",
            )
        self.prompt.model.load_state_dict(state, strict=False)

    def require_gradient(self, step: int) -> None:
        """Check, right before a step, that the loss has reached the prompt.

        Raises:
            NotAttachedError: the prompt has been removed.
            TrainerError: no gradient has come.
        """
        self.prompt._require_attached()
        require_gradient(self.prompt, step)

    def verify_frozen(self) -> FrozenReport:
        """Prove that nothing else has moved, and remember what was read. See `SoftPrompt.verify_frozen`."""
        self.report = None
        self.report = self.prompt.verify_frozen()
        return self.report


def require_optimizer(prompt: SoftPrompt, optimizer: Any) -> None:
    """Check that an optimizer trains a prompt and nothing else.

    Raises:
        TrainerError: it holds other parameters, or not all of the prompt's.
    """
    if is_mended(optimizer, prompt):
        return
    held, trained = sum(len(group["params"]) for group in optimizer.param_groups), list(prompt.parameters())
    raise TrainerError(
        "the optimizer must hold exactly the parameters that the prompt trains.",
        "Make it after `attach`, from `prompt.parameters()`.",
        optimizer=f"{type(optimizer).__name__} of {held} tensors",
        prompt=f"{len(trained)} tensors, {sum(parameter.numel() for parameter in trained):,} parameters",
    )

"""The training state of a prompt, for frameworks that save objects with `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from softhooks.errors import TrainerError
from softhooks.integration_support.checkpoints import CONTAINER, CheckpointSaver, saver_of
from softhooks.integration_support.training import FrozenReport, is_mended, require_gradient, require_trainable_prompt
from softhooks.prompt import SoftPrompt


class LivePrompt:
    """The training state of a prompt, which replaces the model in a framework's checkpoints.

    Like a Trainer's checkpoint, it holds the live parameters and a description that identifies the run. Creating it makes the
    model's `save_pretrained` write only the prompt.

    Args:
        prompt: the attached prompt.
        optimizer: an optimizer that holds exactly the prompt's parameters. A state that was saved with an optimizer of another
            class cannot be loaded. If None, optimizers are not checked.

    Attributes:
        prompt: the prompt.
        report: the report of the last check of the base; None before the first check.

    Raises:
        NotAttachedError: the prompt has been removed.
        TrainerError: the prompt has no trainable parameters, the optimizer does not hold exactly the prompt's parameters, or
            the model's checkpoints already hold another prompt.
    """

    def __init__(self, prompt: SoftPrompt, optimizer: Any = None) -> None:
        prompt._require_attached()
        require_trainable_prompt(prompt)
        present = saver_of(prompt.model)
        if present is not None and present.prompt is not prompt and present.prompt.is_attached:
            raise TrainerError(
                f"the model's checkpoints already hold the prompt {present.prompt.name!r}; they can hold only one prompt.",
                "Remove the other prompt, or attach this one to another model.",
                asked=repr(prompt.name),
            )
        if optimizer is not None:
            require_optimizer(prompt, optimizer)
        self.prompt = prompt
        self.report: FrozenReport | None = None
        self._saver = CheckpointSaver(prompt, self)
        self._saver.optimizer = None if optimizer is None else type(optimizer).__name__

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live parameters and the description, all as tensors, which any format can store."""
        self.prompt._require_attached()
        return {name: tensor.detach() for name, tensor in self._saver.state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load a state that `state_dict` returned.

        Args:
            strict: ignored; all trained tensors must be present.

        Raises:
            NotAttachedError: the prompt has been removed.
            TrainerError: the state contains no prompt, or belongs to another prompt, method, base or optimizer. Nothing is
                loaded.
        """
        self.prompt._require_attached()
        if not all(isinstance(value, Tensor) for value in state_dict.values()):
            kinds = sorted({type(value).__name__ for value in state_dict.values()})
            raise TrainerError(f"the state dict of the prompt holds {', '.join(kinds)}; it must hold tensors only.")
        state = dict(state_dict)
        self._saver.check(state)
        if not self._saver.loaded:
            raise TrainerError(
                f"the checkpoint has no prompt named {self.prompt.name!r}, so the run cannot be resumed from it.",
                "Load a checkpoint of a run whose prompt has this name.",
                expected=f"{CONTAINER}.{self.prompt.name}.*",
                found=", ".join(sorted(state)[:3]) or "nothing",
            )
        self.prompt.model.load_state_dict(state, strict=False)

    def require_gradient(self, step: int) -> None:
        """Check before a step that the prompt is attached and has a gradient."""
        self.prompt._require_attached()
        require_gradient(self.prompt, step)

    def verify_frozen(self) -> FrozenReport:
        """Check that the base has not changed, and store the report; see `SoftPrompt.verify_frozen`."""
        self.report = None
        self.report = self.prompt.verify_frozen()
        return self.report


def require_optimizer(prompt: SoftPrompt, optimizer: Any) -> None:
    """Check that an optimizer holds exactly the trainable parameters of a prompt."""
    if is_mended(optimizer, prompt):
        return
    held, trained = sum(len(group["params"]) for group in optimizer.param_groups), list(prompt.parameters())
    raise TrainerError(
        "the optimizer does not hold exactly the trainable parameters of the prompt.",
        "Create it after `attach`, from `prompt.parameters()`.",
        optimizer=f"{type(optimizer).__name__} of {held} tensors",
        prompt=f"{len(trained)} tensors, {sum(parameter.numel() for parameter in trained):,} parameters",
    )

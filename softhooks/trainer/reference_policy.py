"""The reference model for preference training: the policy without its trained prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.probing import eval_mode
from softhooks.compat.sharding import is_sharded_model
from softhooks.errors import TrainerError
from softhooks.runtime.prompted_model import prompted_model_of, require_prompted_model
from softhooks.runtime.with_blocks import Block
from softhooks.switch import disabled


class Reference(nn.Module):
    """Runs the policy without its trained prompt, in evaluation mode and without gradients.

    This module has no parameters, so a trainer that moves or freezes it does not change the policy.

    Args:
        model: the policy; its prompt may be attached later.
        prompt: the name of another, frozen prompt to run the model with, or None to run it without prompts.

    Raises:
        TrainerError: in a forward pass, if parameters of the reference are being trained or the model is sharded.
        NotAttachedError: in a forward pass, if the model has no prompt with this name.
    """

    policy: Any

    def __init__(self, model: nn.Module, prompt: str | None = None) -> None:
        super().__init__()
        self.__dict__["policy"] = model  # not a submodule, because trainers and accelerate move and change submodules
        self.prompt = prompt

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.policy.config

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone, for losses that compute the logits themselves."""
        with self._alone(), self._fixed():
            return self._unwrapped.base_model(*args, **kwargs)

    def get_output_embeddings(self) -> Any:
        """Return the language model's head."""
        return self._unwrapped.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with self._alone(), self._fixed():
            return self.policy(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the reference's tensors; trainers hash them to find cached log-probabilities."""
        state = self.policy.state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if _is_in_reference(key, self.prompt)}

    @property
    def _unwrapped(self) -> Any:
        return self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy

    def _alone(self) -> AbstractContextManager[None]:
        """Return a context manager in which no other thread runs the model, because `_fixed` changes the mode of its modules."""
        prompted = prompted_model_of(self.policy)
        if prompted is None:
            return nullcontext()
        return prompted.running.exclusive("the forward of a reference model", lambda: self.policy.training)

    @contextmanager
    def _fixed(self) -> Iterator[None]:
        require_fixed(self.policy, self.prompt)
        prompted = prompted_model_of(self.policy)
        with eval_mode(self.policy):
            if prompted is None:
                yield
            elif self.prompt is None:
                with disabled(self.policy):
                    yield
            else:
                with Block(prompted.model, only=self.prompt):
                    yield


def _is_in_reference(key: str, prompt: str | None) -> bool:
    return not is_prompt_key(key) or (prompt is not None and is_prompt_key(key, prompt))


def require_fixed(model: nn.Module, prompt: str | None) -> None:
    """Check that a model can be its own reference.

    Args:
        prompt: as in `Reference`.

    Raises:
        TrainerError: a parameter of the reference is being trained, or the model is sharded.
        NotAttachedError: the model has no prompt with this name.
    """
    if prompt is not None:
        require_prompted_model(model, prompt)
    trained = [key for key, p in model.named_parameters() if p.requires_grad and _is_in_reference(key, prompt)]
    if trained:
        raise TrainerError(
            f"{trained[0]} of the reference model is being trained; a reference must not change.",
            "Train only the prompt (no `trainable=`, and no second trainable prompt), or pass another model as `ref_model`.",
            reference=f"{type(model).__name__} with {'no prompt' if prompt is None else f'the prompt {prompt!r}'}",
            trained=f"{len(trained)} tensors",
        )
    if is_sharded_model(model):
        raise TrainerError(
            "the model is sharded (FSDP), so it cannot be its own reference.",
            "Pass another model as `ref_model`.",
        )

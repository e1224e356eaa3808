"""A model as its own reference: the policy that a prompt trains, without that prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.stack import at_rest
from softhooks.compat.sharding import shards
from softhooks.errors import TrainerError
from softhooks.runtime.contexts import Block
from softhooks.runtime.prompted_model import prompted_model_of, require_prompted_model
from softhooks.switch import disabled


class Reference(nn.Module):
    """A model with its trained prompt off, in evaluation mode and without gradients.

    It holds no parameters: what a trainer does to it does not reach the policy. It has what TRL asks a reference for.

    Args:
        model: the policy; it may get its prompt later.
        prompt: another prompt of the model, which must rest, to run with; None: the bare model.

    Raises:
        TrainerError: when it runs: more than the prompt trains, so that it would move, or the model is sharded.
        NotAttachedError: when it runs: the model carries no prompt of that name.
    """

    policy: Any

    def __init__(self, model: nn.Module, prompt: str | None = None) -> None:
        super().__init__()
        self.__dict__["policy"] = model  # not as a submodule: TRL and accelerate move and change what is inside
        self.prompt = prompt

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.policy.config

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone; TRL puts the head on itself."""
        with self._fixed():
            return self._unwrapped.base_model(*args, **kwargs)

    def get_output_embeddings(self) -> Any:
        """The language model's head."""
        return self._unwrapped.get_output_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole model."""
        with self._fixed():
            return self.policy(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What the reference is made of; TRL knows by it whether it has computed its log-probabilities already."""
        state = self.policy.state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if _belongs(key, self.prompt)}

    @property
    def _unwrapped(self) -> Any:
        return self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy

    @contextmanager
    def _fixed(self) -> Iterator[None]:
        require_fixed(self.policy, self.prompt)
        prompted = prompted_model_of(self.policy)
        with at_rest(self.policy):
            if prompted is None:
                yield
            elif self.prompt is None:
                with disabled(self.policy):
                    yield
            else:
                with Block(prompted.model, alone=self.prompt):
                    yield


def _belongs(key: str, prompt: str | None) -> bool:
    """Whether a tensor of the model is one of a reference, by its name."""
    return not is_prompt_key(key) or (prompt is not None and is_prompt_key(key, prompt))


def require_fixed(model: nn.Module, prompt: str | None) -> None:
    """Check that a reference can run, and that nothing trains of which it is made.

    Raises:
        TrainerError: something does, or the model is sharded.
        NotAttachedError: the model carries no prompt of that name.
    """
    if prompt is not None:
        require_prompted_model(model, prompt)
    moving = [key for key, p in model.named_parameters() if p.requires_grad and _belongs(key, prompt)]
    if moving:
        raise TrainerError(
            "a reference must stay as it is while the policy trains.",
            "Train only the prompt (no `trainable=`, and a prompt that rests), or give `ref_model` a model of its own.",
            reference=f"{type(model).__name__} with {'no prompt' if prompt is None else f'the prompt {prompt!r}'}",
            trains=f"{len(moving)} of its tensors, {moving[0]} first",
        )
    if shards(model):
        raise TrainerError(
            "a sharded model runs as a whole, and cannot be its own reference.",
            "Give `ref_model` a model of its own.",
            found="FSDP",
        )

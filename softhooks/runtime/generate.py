"""Replacements for `generate` and for two methods that it calls, on a model with prompts."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModeError
from softhooks.inject.reuse import new_scope
from softhooks.patching.patches import MethodWrapper
from softhooks.runtime.exclusive_forwards import generation_needs_model_alone
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.with_blocks import Block, generation_of


class PromptedMethod(MethodWrapper):
    """Replaces a method of a model until the last prompt is removed."""

    def __init__(self, prompted: PromptedModel, model: nn.Module, name: str) -> None:
        super().__init__(model, name)
        self.prompted = prompted

    @classmethod
    def replace(cls, prompted: PromptedModel, name: str) -> None:
        """Replace a method, if the model has it and it has not been replaced yet."""
        model = unwrapped(prompted.model)
        if callable(getattr(model, name, None)) and not isinstance(model.__dict__.get(name), cls):
            prompted.patches.set(model, name, cls(prompted, model, name))


class Generate(PromptedMethod):
    """The replacement for `generate`."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the prompts that are selected now, computing each prompt only once."""
        prompted = self.prompted
        call = prompted.running.exclusive("`generate`", lambda: generation_needs_model_alone(prompted))
        with call, Block(prompted.model, generates=True), new_scope(prompted.model):
            prompted.refuse_unused(kwargs)
            return self.original()(*args, **kwargs)


class ExpandInputs(PromptedMethod):
    """The replacement for `_expand_inputs_for_generation`."""

    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Store the length and the mask of the input and the number of beams or samples, then expand the inputs."""
        generation = generation_of(self.prompted.model)
        if generation is not None:
            text = kwargs.get("input_ids")
            if not isinstance(text, Tensor) or not text.shape[-1]:
                text = kwargs.get("inputs_embeds")
            generation.prompt_columns = text.shape[1] if isinstance(text, Tensor) else None
            generation.repeats = expand_size
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                generation.mask = mask.repeat_interleave(expand_size, 0)
        elif self.prompted.is_in_use and (
            self.prompted.rows is not None
            or any(prompt.layout.form.searches for prompt in self.prompted.prompts.values())
        ):
            raise UnsupportedModeError(
                f"`{type(self.model).__name__}.generate` was called, not `model.generate`, so the prompt of each row is unknown.",
                "Call `model.generate(...)` on the instance.",
            )
        return self.original()(expand_size, *args, **kwargs)


class CandidateGenerator(PromptedMethod):
    """The replacement for `_get_candidate_generator`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Remove the prompts' columns that the assistant model's forward does not accept."""
        assistant, given = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if assistant is not None and given:
            named = inspect.signature(assistant.forward).parameters
            own = set(self.prompted.columns).difference(named)
            kwargs["model_kwargs"] = {key: value for key, value in given.items() if key not in own}
        return self.original()(*args, **kwargs)

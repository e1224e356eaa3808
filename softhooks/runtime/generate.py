"""`generate` on a model with prompts: repeated rows, the length of the input, and assistant models without prompts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModeError
from softhooks.inject.reuse import new_scope
from softhooks.patching.method_wrapper import MethodWrapper
from softhooks.runtime.with_blocks import Block, generation_of

if TYPE_CHECKING:
    from softhooks.runtime.prompted_model import PromptedModel

_EXPAND = "_expand_inputs_for_generation"
_DRAFT = "_get_candidate_generator"


class PromptedMethod(MethodWrapper):
    """A method of a prompted model, replaced on the instance."""

    def __init__(self, prompted: PromptedModel, model: nn.Module, name: str) -> None:
        super().__init__(model, name)
        self.prompted = prompted


class _Generate(PromptedMethod):
    """Refuses other threads until the last token is generated, so that generation is never interrupted.

    Prompts are computed once, at the prefill, and reused for all later tokens.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held, block = self.prompted.running.exclusive("`generate`"), Block(self.prompted.model, generates=True)
        with held, block, new_scope(self.prompted.model):
            self.prompted.refuse_unused(kwargs)
            return self.original()(*args, **kwargs)


class _Expand(PromptedMethod):
    """Notes the number of input columns, and the number of beams or samples for each row."""

    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        generation = generation_of(self.prompted.model)
        if generation is not None:
            text = kwargs.get("input_ids")
            if not isinstance(text, Tensor) or not text.shape[-1]:
                text = kwargs.get("inputs_embeds")
            generation.prompt_columns = text.shape[1] if isinstance(text, Tensor) else None
            generation.repeats = expand_size
        elif self.prompted.is_in_use and (self.prompted.rows is not None or _has_searching_layout(self.prompted)):
            raise UnsupportedModeError(
                f"`{type(self.model).__name__}.generate` was called instead of `model.generate`; the prompts' rows are unknown.",
                "Call `model.generate(...)` on the instance.",
            )
        return self.original()(expand_size, *args, **kwargs)


class _Draft(PromptedMethod):
    """Removes the prompts' columns from the arguments of an assistant model whose forward does not take them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assistant, given = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if assistant is not None and given:
            named = inspect.signature(assistant.forward).parameters
            own = set(self.prompted.columns).difference(named)
            kwargs["model_kwargs"] = {key: value for key, value in given.items() if key not in own}
        return self.original()(*args, **kwargs)


def _has_searching_layout(prompted: PromptedModel) -> bool:
    return any(prompt.layout.form.searches for prompt in prompted.prompts.values())


def wrap_candidate_generator(prompted: PromptedModel) -> None:
    """Keep the prompts' columns from assistant models, unless their forward takes them."""
    model = unwrapped(prompted.model)
    if hasattr(model, _DRAFT) and not isinstance(model.__dict__.get(_DRAFT), _Draft):
        prompted.patches.set(model, _DRAFT, _Draft(prompted, model, _DRAFT))


def wrap_generate(prompted: PromptedModel) -> None:
    """Wrap `generate` and `_expand_inputs_for_generation` until the last prompt is removed."""
    model = unwrapped(prompted.model)
    if callable(getattr(model, "generate", None)):
        prompted.patches.set(model, "generate", _Generate(prompted, model, "generate"))
    if hasattr(model, _EXPAND):
        prompted.patches.set(model, _EXPAND, _Expand(prompted, model, _EXPAND))

"""What `generate` has to know of prompts: which rows are whose, where a prompt ends, and what an assistant is not given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModeError
from softhooks.inject.reuse import generating
from softhooks.runtime.contexts import Block, generation_of

if TYPE_CHECKING:
    from softhooks.runtime.prompted_model import PromptedModel

_EXPAND = "_expand_inputs_for_generation"
_DRAFT = "_get_candidate_generator"


class Noting:
    """One of a model's own functions, noting what passes. An object, so that a deep copy of the model calls its own.

    Args:
        prompted: where it is noted.
        model: whose function it is.
        name: of the function.
    """

    def __init__(self, prompted: PromptedModel, model: nn.Module, name: str) -> None:
        self.prompted = prompted
        self.model = model
        self.name = name
        self.before: Callable[..., Any] | None = model.__dict__.get(name)

    def own(self) -> Callable[..., Any]:
        """The function as the model had it."""
        if self.before is not None:
            return self.before
        kind = type(self.model)
        own: Callable[..., Any] = inspect.getattr_static(kind, self.name).__get__(self.model, kind)
        return own


class _Generate(Noting):
    """Keeps other threads away until the last token, for one of the two would be refused in the middle of its text.

    Prompts are computed once: at the prefill, for all tokens that follow.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held, block = self.prompted.running.exclusive("its `generate`"), Block(self.prompted.model, generates=True)
        with held, block, generating(self.prompted.model):
            self.prompted.refuse_unused(kwargs)
            return self.own()(*args, **kwargs)


class _Expand(Noting):
    def __call__(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        generation = generation_of(self.prompted.model)
        if generation is not None:
            text = kwargs.get("input_ids")
            if not isinstance(text, Tensor) or not text.shape[-1]:
                text = kwargs.get("inputs_embeds")
            generation.prompt_columns = text.shape[1] if isinstance(text, Tensor) else None
            generation.repeats = expand_size
        elif self.prompted.is_in_use and (self.prompted.rows is not None or _searches(self.prompted)):
            raise UnsupportedModeError(
                "a prompt must know of a `generate` which rows and columns are whose.",
                "Call `model.generate(...)`, not the function of its class.",
                model=type(self.model).__name__,
            )
        return self.own()(expand_size, *args, **kwargs)


class _Draft(Noting):
    """An assistant gets all that the model was called with, and refuses what its own forward does not name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assistant, given = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if assistant is not None and given:
            named = inspect.signature(assistant.forward).parameters
            own = set(self.prompted.columns).difference(named)
            kwargs["model_kwargs"] = {key: value for key, value in given.items() if key not in own}
        return self.own()(*args, **kwargs)


def _searches(prompted: PromptedModel) -> bool:
    return any(prompt.layout.searches for prompt in prompted.prompts.values())


def keep_from_assistants(prompted: PromptedModel) -> None:
    """Keep the columns that the prompts take from assistant models, unless these take them too."""
    model = unwrapped(prompted.model)
    if hasattr(model, _DRAFT) and not isinstance(model.__dict__.get(_DRAFT), _Draft):
        prompted.patches.set(model, _DRAFT, _Draft(prompted, model, _DRAFT))


def watch_generate(prompted: PromptedModel) -> None:
    """Note what `generate` is given and how it repeats rows, for as long as it runs, until the last prompt is removed."""
    model = unwrapped(prompted.model)
    if callable(getattr(model, "generate", None)):
        prompted.patches.set(model, "generate", _Generate(prompted, model, "generate"))
    if hasattr(model, _EXPAND):
        prompted.patches.set(model, _EXPAND, _Expand(prompted, model, _EXPAND))

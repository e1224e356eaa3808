"""Suggest remedies in the errors that `attach` raises, after trying them on the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from torch import nn

from softhooks.backbone.probing import INSIDE, OTHER_METHOD
from softhooks.errors import AttachError, SoftHooksError
from softhooks.method import Method
from softhooks.methods import LlamaAdapter, PrefixTuning, PromptTuning
from softhooks.prompt import SoftPrompt
from softhooks.runtime.prompted_model import prompted_model_of

Arguments = ParamSpec("Arguments")
Attach = Callable[[nn.Module, Method, str], SoftPrompt]

_TRIAL = "softhooks_trial"


def names_tried_remedies(
    attach: Attach,
) -> Callable[[Callable[Arguments, SoftPrompt]], Callable[Arguments, SoftPrompt]]:
    """Decorate a function that attaches a prompt, so that its errors suggest only remedies that work on the model.

    The function's first arguments are the model, the method and the name. If it raises an error, the model must be unchanged.

    Args:
        attach: the function to call to try a remedy.
    """

    def decorate(function: Callable[Arguments, SoftPrompt]) -> Callable[Arguments, SoftPrompt]:
        @functools.wraps(function)
        def attach_or_advise(*args: Arguments.args, **kwargs: Arguments.kwargs) -> SoftPrompt:
            try:
                return function(*args, **kwargs)
            except AttachError as error:
                model, method, name = args[:3]
                message = str(error)
                if (
                    not isinstance(model, nn.Module)
                    or not isinstance(method, Method)
                    or name == _TRIAL
                    or prompted_model_of(model) is not None
                    or not (INSIDE in message or OTHER_METHOD in message)
                ):
                    raise
                if INSIDE in message:
                    message = message.replace(INSIDE, _inside(attach, model, method))
                if OTHER_METHOD in message:
                    message = message.replace(OTHER_METHOD, _other_method(attach, model, method))
                advice, cause = type(error)(message), error.__cause__
            raise advice from cause

        return attach_or_advise

    return decorate


def _inside(attach: Attach, model: nn.Module, method: Method) -> str:
    """Suggest attaching the method to a text model inside this model, if that works."""
    for path, part in model.named_modules():
        if part is model or not hasattr(part, "config") or not callable(getattr(part, "get_input_embeddings", None)):
            continue
        if not _is_fed(part) and _fits(attach, part, method):
            return f"Attach to the inner text model `model.{path}`, a {type(part).__name__}."
    return "Attach to another model: no part of this model runs on token ids alone."


def _is_fed(part: nn.Module) -> bool:
    """Whether a submodule takes hidden states from another submodule, like a decoder that attends to an image."""
    arguments = inspect.signature(part.forward).parameters
    return any(name.endswith("_states") and name not in ("hidden_states", "output_hidden_states") for name in arguments)


def _other_method(attach: Attach, model: nn.Module, method: Method) -> str:
    """Suggest methods that can be attached to the model."""
    others: list[Method] = [PromptTuning(1), PrefixTuning(1), LlamaAdapter(1)]
    names = [type(other).__name__ for other in others if other.enters != method.enters and _fits(attach, model, other)]
    if not names:
        return "No other method works with this model either; tune its weights with adapters such as LoRA."
    return f"Use a method that works with this model, such as {' or '.join(names)}."


def _fits(attach: Attach, model: nn.Module, method: Method) -> bool:
    try:
        attach(model, method, _TRIAL).remove()
    except SoftHooksError:
        return False
    return True

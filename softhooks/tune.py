"""`tune`, a decorator for your own training function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import nn

from softhooks.attach import attach
from softhooks.errors import OptionError
from softhooks.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
R = TypeVar("R")

HANDLE = "soft_prompt"
"""The name of the function's parameter to which the attached prompt is passed."""


def tune(
    method: Method,
    *,
    save_to: str | Path | None = None,
    name: str = "default",
    model: str | None = None,
    train_head: bool = True,
    trainable: str | Sequence[str] = (),
    freeze_dropout: bool = False,
    train_added_tokens: bool | Sequence[int] | PreTrainedTokenizerBase = False,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[..., R]]:
    """Attach a prompt before each call to a function. After the call, check the frozen weights, save the prompt, and remove it.

    If the function has a parameter `soft_prompt`, the attached prompt is passed to it. If the function raises an error, the
    prompt is removed without being saved.

    Args:
        method: the method and its options, such as `PromptTuning(20)`.
        save_to: the directory to save the prompt to, or None to save nothing.
        name: the name of the prompt on the model.
        model: the name of the function's parameter for the model, or None for the first argument that is a module.
        train_head, trainable, freeze_dropout, train_added_tokens, example: as in `attach`.

    Raises:
        OptionError: a call has no model among its arguments, or the function is a coroutine or a generator.
        FrozenModifiedError: the function has changed a frozen tensor; nothing is saved.
    """

    def decorate(function: Callable[P, R]) -> Callable[..., R]:
        _refuse_deferred(function)
        signature = inspect.signature(function)
        takes_handle = HANDLE in signature.parameters

        @functools.wraps(function)
        def tuned(*args: Any, **kwargs: Any) -> R:
            given = _by_name(signature, signature.bind_partial(*args, **kwargs).arguments)
            target = _find_model(given, model, getattr(function, "__name__", repr(function)))
            prompt = attach(
                target,
                method,
                name,
                train_head=train_head,
                trainable=trainable,
                freeze_dropout=freeze_dropout,
                train_added_tokens=train_added_tokens,
                example=example,
            )
            with prompt:
                if takes_handle and HANDLE not in given:
                    kwargs[HANDLE] = prompt
                result = function(*args, **kwargs)
                prompt.verify_frozen()
                if save_to is not None:
                    prompt.save_pretrained(save_to)
            return result

        return tuned

    return decorate


def _refuse_deferred(function: Callable[..., Any]) -> None:
    deferred = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(kind(function) for kind in deferred):
        raise OptionError(
            "`tune` decorates a coroutine or a generator, whose body would run after the prompt is removed.",
            "Use `with softhooks.attach(model, method) as prompt:` in the body instead.",
            function=getattr(function, "__name__", function),
        )


def _by_name(signature: inspect.Signature, given: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, including those in `*args` and `**kwargs`."""
    named: dict[str, Any] = {}
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"*{name}[{number}]": item for number, item in enumerate(value)}
        else:
            named[name] = value
    return named


def _find_model(given: dict[str, Any], name: str | None, function: str) -> nn.Module:
    found = given.get(name) if name is not None else next((v for v in given.values() if isinstance(v, nn.Module)), None)
    if isinstance(found, nn.Module):
        return found
    raise OptionError(
        f"{function!r}, which is decorated with `tune`, was called without a model.",
        "Pass the model as an argument, or give the name of its parameter: `@softhooks.tune(method, model='net')`.",
        expected="an argument that is a module" if name is None else f"a module as {name!r}",
        given=", ".join(f"{key}: {type(value).__name__}" for key, value in given.items()) or "nothing",
    )

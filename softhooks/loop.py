"""`tune`: a decorator around a training function of one's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from softhooks.attach import attach
from softhooks.errors import OptionError
from softhooks.method import Method

P = ParamSpec("P")
R = TypeVar("R")

HANDLE = "soft_prompt"
"""The parameter by which a decorated function takes the handle."""


def tune(
    method: Method,
    *,
    save_to: str | Path | None = None,
    name: str = "default",
    model: str | None = None,
    train_head: bool = True,
    trainable: str | Sequence[str] = (),
    freeze_dropout: bool = False,
) -> Callable[[Callable[P, R]], Callable[..., R]]:
    """Attach a prompt for each call of a function: it is attached, trained by the function, checked, saved, and removed.

    The function takes the handle too, if it has a parameter named `soft_prompt`. If it raises, nothing is saved and the model is
    as it was.

    Args:
        method: what to attach.
        save_to: where to save the prompt when the function has returned.
        name: under which to attach it.
        model: the name of the function's parameter that is the model; None: the first argument that is a module.
        train_head, trainable, freeze_dropout: as in `attach`.

    Raises:
        OptionError: no argument of a call is a model.
        FrozenModifiedError: after the call, if something frozen has moved; then nothing is saved.
    """

    def decorate(function: Callable[P, R]) -> Callable[..., R]:
        signature = inspect.signature(function)
        takes_handle = HANDLE in signature.parameters

        @functools.wraps(function)
        def tuned(*args: Any, **kwargs: Any) -> R:
            given = signature.bind_partial(*args, **kwargs).arguments
            target = _find_model(given, model, function.__name__)
            prompt = attach(
                target, method, name, train_head=train_head, trainable=trainable, freeze_dropout=freeze_dropout
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


def _find_model(given: dict[str, Any], name: str | None, function: str) -> nn.Module:
    if name is not None and isinstance(given.get(name), nn.Module):
        found: nn.Module = given[name]
        return found
    modules = [value for value in given.values() if isinstance(value, nn.Module)]
    if name is not None or not modules:
        wanted = f"a module as {name!r}" if name else "a module among its arguments"
        raise OptionError(f"{function} is decorated with tune and must be called with {wanted}; it was not.")
    return modules[0]

"""Probes of a model: whatever goes wrong in one is an error of softhooks, with the cause kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.module_walk import every_module
from softhooks.errors import AttachError, SoftHooksError, UnsupportedModeError, UnsupportedModelError

INSIDE = "Attach to a text model inside it, if one runs on token ids alone."
OTHER_METHOD = "Use another method, if one can enter this model."
"""Remedies that `softhooks.checks.remedies` tries, and puts what it found in their place."""


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Turn what a model raises in a probe into an error that says so; errors of softhooks pass.

    Raises:
        UnsupportedModelError: the model raised something else.
    """
    try:
        yield
    except SoftHooksError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            "a soft prompt needs a model that runs in each of the probes at attach.",
            "See the cause; if the model runs on `input_ids` and `attention_mask` by itself, this is a limit of softhooks.",
            model=type(model).__name__,
            cause=f"{type(error).__name__}: {error}",
        ) from error


class _RefusedModeError(UnsupportedModelError, UnsupportedModeError):
    """A way in cannot serve what the model always does."""


@contextmanager
def proving(model: nn.Module) -> Iterator[None]:
    """Turn whatever a forward with a prompt raises, when it is tried at attach, into a refusal to attach.

    Raises:
        UnsupportedModelError: the forward failed.
    """
    try:
        with probing(model):
            yield
    except AttachError:
        raise
    except SoftHooksError as error:
        kind = _RefusedModeError if isinstance(error, UnsupportedModeError) else UnsupportedModelError
        raise kind(
            "a prompt can be attached to a model only if a forward of plain text goes through it.",
            OTHER_METHOD,
            model=type(model).__name__,
            cause=f"{type(error).__name__}: {error}",
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run probes without gradient, dropout, autocast or a trace in the random state; restore every mode."""
    training = [module for module in every_module(model) if module.training]
    state = torch.get_rng_state()
    for module in training:
        module.__dict__["training"] = False  # past the setter of nn.Module, which looks among parameters first
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(state)
        for module in training:
            module.__dict__["training"] = True


def last_hidden_state(output: Any) -> Tensor:
    """The last hidden state of a stack's output, whatever form the output has."""
    state = output if isinstance(output, Tensor) else output[0]
    if not isinstance(state, Tensor):
        raise UnsupportedModelError(
            f"a stack must return a tensor of states first; it returned {type(state).__name__}."
        )
    return state

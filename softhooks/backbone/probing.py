"""Run a model on probe inputs: in evaluation mode, with recorded hidden states, and with errors that name the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.module_walk import every_module
from softhooks.backbone.stack_state import StackState
from softhooks.errors import AttachError, SoftHooksError, UnsupportedModeError, UnsupportedModelError
from softhooks.patching.patches import Patches

FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)
"""The errors that a model may raise in a forward that it does not support."""

INSIDE = "Attach to a text model inside it, if one runs on token ids alone."
OTHER_METHOD = "Use another method, if one works with this model."
"""Remedies that `softhooks.checks.remedies` replaces, in an error, with ones that it has tried on the model."""


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Turn any exception in the `with` block, except softhooks' own errors, into an `UnsupportedModelError`."""
    try:
        yield
    except SoftHooksError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} failed in a forward pass that `attach` runs as a check.",
            "Check that the model runs on such a batch without a prompt; if it does, softhooks does not support it.",
            cause=f"{type(error).__name__}: {error}",
        ) from error


class _UnsupportedModelModeError(UnsupportedModelError, UnsupportedModeError):
    """The prompt does not support a mode that the model always uses."""


@contextmanager
def probing_with_prompt(model: nn.Module) -> Iterator[None]:
    """Turn errors in the `with` block, except `AttachError`, into `UnsupportedModelError`.

    If the original error is an `UnsupportedModeError`, the new one is an instance of both classes.
    """
    try:
        with probing(model):
            yield
    except AttachError:
        raise
    except SoftHooksError as error:
        kind = _UnsupportedModelModeError if isinstance(error, UnsupportedModeError) else UnsupportedModelError
        raise kind(
            f"{type(model).__name__} failed in a probe forward with the prompt.",
            OTHER_METHOD,
            cause=f"{type(error).__name__}: {error}",
        ) from error


# --- mode -------------------------------------------------------------------------------------------------------------


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the `with` block without gradients or dropout; then restore the mode of every module and the random state."""
    random_state = torch.get_rng_state()
    with Patches() as patches, torch.no_grad():
        for module in every_module(model):
            if module.training:
                patches.set(module, "training", False)  # not by `eval()`, whose setattr is slow in a large model
        try:
            yield
        finally:
            torch.set_rng_state(random_state)


@contextmanager
def seeded(module: nn.Module) -> Iterator[None]:
    """Run the `with` block with random seed 0, so that every run draws the same random numbers; then restore the random state."""
    devices = {weight.device for weight in module.parameters()}
    with torch.random.fork_rng([device.index for device in devices if device.type == "cuda"]):
        # `torch.manual_seed` also seeds CUDA lazily, which takes as long as the forward of a small model.
        on_cpu = all(device.type == "cpu" for device in devices)
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(0)
        yield


# --- states -----------------------------------------------------------------------------------------------------------


def last_hidden_state(output: Any) -> Tensor:
    """Read the last hidden state from the output of a stack: a tensor, a tuple or a `ModelOutput`."""
    state = output if isinstance(output, Tensor) else output[0]
    if not isinstance(state, Tensor):
        raise UnsupportedModelError(
            f"the first output of the text backbone has the type {type(state).__name__}; it must be a tensor of hidden states."
        )
    return state


@contextmanager
def recorded_states(module: nn.Module, state: StackState | None = None) -> Iterator[list[Tensor]]:
    """Record the last hidden states that a stack returns while the `with` block runs, one tensor per forward.

    Args:
        module: the module of the stack.
        state: the stack's `state`, if prompts may be active; forwards that compute a prompt are then not recorded.
    """
    states: list[Tensor] = []
    outer = None if state is None else state.current

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        if state is None or state.current is outer:
            states.append(last_hidden_state(output).detach())

    handle = module.register_forward_hook(record)
    try:
        yield states
    finally:
        handle.remove()


def float_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def relative_difference(states: Tensor, reference: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the largest absolute value of the second."""
    if states.shape != reference.shape:
        return float("inf")
    states, reference = states.float(), reference.float()
    return float((states - reference).abs().amax() / reference.abs().amax().clamp(min=1e-6))


def are_close(states: Tensor, reference: Tensor) -> bool:
    """Whether two tensors are equal except for the rounding errors of a forward in their dtype."""
    return bool(relative_difference(states, reference) <= 200 * torch.finfo(reference.dtype).eps ** 0.9)

"""The proof at attach that a prompt reaches the model's output, and a gradient every part of it that is to be trained.

It is made with a copy of the encoder, moved away from where the prompt starts, since a start may change nothing by design (gates
at zero). The prompt itself, gradients, random states and what is kept from forward to forward stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.module_walk import every_module
from softhooks.backbone.probing import OTHER_METHOD, eval_mode, probing_with_prompt
from softhooks.checks.injection import probe_inputs
from softhooks.compat.peft import unwrapped
from softhooks.constraint import unwatch
from softhooks.encoder import PromptEncoder
from softhooks.errors import UnsupportedModelError
from softhooks.prompt import SoftPrompt

_SCALES = (1.0, 0.1, 10.0)
"""How far the copies are moved, in turn, where one shows nothing: too far overflows, too little drowns in a low precision."""


def prove_reach(prompt: SoftPrompt) -> None:
    """Show that the prompt changes the model's output and, if it is to be trained, that every part of it gets a gradient.

    In inference mode there are no gradients; then the output alone is shown.

    Raises:
        UnsupportedModelError: the model does not run with the prompt, or the prompt or a part of it does nothing.
    """
    trains = any(parameter.requires_grad for parameter in prompt.encoder.parameters())
    with probing_with_prompt(prompt.model), eval_mode(prompt.model):
        if trains and not torch.is_inference_mode_enabled():
            _show_gradient(prompt)
        else:
            _show_effect(prompt)


# --- the output -------------------------------------------------------------------------------------------------------


def _show_effect(prompt: SoftPrompt) -> None:
    """Compare the outputs of two prompts."""
    for scale in _SCALES:
        outputs = []
        for seed in (0, 1):
            with standing_in(prompt, scale, seed):
                outputs.append(_output(prompt))
        one, other = outputs
        if one is not None and other is not None and not torch.equal(one, other):
            return
    raise _refusal(prompt, "two different prompts give the same output")


def _output(prompt: SoftPrompt) -> Tensor | None:
    """What the model is run for: the first floating-point tensor that it returns. None if it has numbers that are not finite."""
    with prompt.without_objective():
        output: Any = prompt.model(**probe_inputs(prompt), **_without_cache(prompt.model))
    values = [output] if isinstance(output, Tensor) else output.values() if hasattr(output, "values") else output
    found = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None:
        raise _refusal(prompt, f"the model returns no floating-point tensor, but a {type(output).__name__}")
    return found if bool(found.isfinite().any()) else None


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Training keeps no cache; some models (RWKV) write into theirs what a backward needs."""
    takes = "use_cache" in inspect.signature(unwrapped(model).forward).parameters
    return {"use_cache": False} if takes and torch.is_grad_enabled() else {}


# --- gradients --------------------------------------------------------------------------------------------------------


def _show_gradient(prompt: SoftPrompt) -> None:
    """Run backward from the output to a copy of the encoder, and name every part that nothing reaches."""
    dead: list[str] = []
    for scale in _SCALES:
        with torch.enable_grad(), standing_in(prompt, scale, seed=0) as encoder:
            dead = _dead_parts(prompt, encoder)
        if not dead:
            return
    raise _refusal(prompt, f"no gradient reaches {_listed(dead)}")


def _dead_parts(prompt: SoftPrompt, encoder: PromptEncoder) -> list[str]:
    """Name what gets no gradient: parameters, and of what the encoder computes the parts for single layers.

    A layer may run without gradients in some of its turns (HRM). What stood there would take part in every answer as it was
    drawn, untrained; and to share another turn's keys and values would make a prefix of real words differ from the words. So
    such a model is refused, and the refusal names the parts.
    """
    made: dict[str, Tensor] = {}

    def note(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        made[args[0]] = output = output.view_as(output)  # not the parameter itself, which may go in by other ways too
        return output

    encoder.register_forward_hook(note)
    with _noting_calls(prompt.model) as called:
        output = _output(prompt)
    if output is None or output.grad_fn is None:
        return ["it, for the output is not finite" if output is None else "any part of it"]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    parameters = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    targets = [*parameters.values(), *made.values()]
    gradients = torch.autograd.grad((output * weights).float().sum(), targets, allow_unused=True)
    dead = [name for name, own in zip(parameters, gradients, strict=False) if not _lives(own)]
    dead = [name for name in dead if name not in encoder.unmoved]
    if prompt.method.has_idle(prompt.method.probe_arguments()):
        dead = dead if len(dead) == len(parameters) else []
    for group, own in zip(made, gradients[len(parameters) :], strict=True):
        for part in prompt.method.parts(prompt.prompted_model.structure, group):
            if part.module in called and not (own is not None and _lives(own[part.rows, part.columns])):
                dead.append(part.name)
    return dead


@contextmanager
def _noting_calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Note which modules are called: an expert that no token is sent to is not."""
    called: set[nn.Module] = set()
    handles = [part.register_forward_pre_hook(lambda module, _args: called.add(module)) for part in every_module(model)]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _lives(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient.nan_to_num() != 0).any())


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) < 5 else f"{shown} and {len(names) - 4} more"


def _refusal(prompt: SoftPrompt, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a prompt must reach the model's output, and be reached by its gradient where it is trained.",
        OTHER_METHOD,
        model=type(prompt.model).__name__,
        method=repr(prompt.method),
        stack=", ".join(stack.path or "the model itself" for stack in prompt.prompted_model.structure.stacks),
        found=found,
    )


# --- the copy ---------------------------------------------------------------------------------------------------------


@contextmanager
def standing_in(prompt: SoftPrompt, scale: float, seed: int) -> Iterator[PromptEncoder]:
    """Let a copy of the encoder, moved at random, stand in its place; nothing that it computes is kept."""
    own = prompt.encoder
    stand_in = copy.deepcopy(own).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        held = [buffer for buffer in stand_in.buffers() if buffer.is_floating_point()]
        for parameter in list(stand_in.parameters()) or held:  # a context that is done has no parameters
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            spread = parameter.float().square().mean().sqrt().clamp(min=0.1, max=10.0).nan_to_num(0.1)
            parameter.add_(noise * (scale * spread).to(parameter))
    kept = prompt._memory, prompt._branches
    prompt._memory, prompt._branches = {}, {}
    prompt.module["encoder"] = stand_in
    try:
        yield stand_in
    finally:
        unwatch(stand_in)
        prompt.module["encoder"] = own
        prompt._memory, prompt._branches = kept

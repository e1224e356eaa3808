"""Check during `attach` that a prompt changes the model's output, and that every trained part of it gets a gradient.

The check uses a randomly changed copy of the encoder, because a new prompt may have no effect by design (gates at zero).
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
from softhooks.checks.choose_injection import probe_inputs
from softhooks.compat.peft import unwrapped
from softhooks.constraint import unwatch
from softhooks.errors import UnsupportedModelError
from softhooks.patching.patches import Patches
from softhooks.prompt import SoftPrompt
from softhooks.prompt_encoder import PromptEncoder

_SCALES = (1.0, 0.1, 10.0)
"""The sizes of random changes to try in turn: a large change may overflow; a small one may be lost in low precision."""


def prove_reach(prompt: SoftPrompt) -> None:
    """Check the gradients, or only the output if the prompt is frozen or torch is in inference mode.

    Raises:
        UnsupportedModelError: the model does not run with the prompt, or the prompt or a part of it has no effect.
    """
    trains = any(parameter.requires_grad for parameter in prompt.encoder.parameters())
    with probing_with_prompt(prompt.model), eval_mode(prompt.model):
        if trains and not torch.is_inference_mode_enabled():
            _show_gradient(prompt)
        else:
            _show_effect(prompt)


# --- the output -------------------------------------------------------------------------------------------------------


def _show_effect(prompt: SoftPrompt) -> None:
    """Check that two randomly changed prompts give different outputs."""
    for scale in _SCALES:
        outputs = []
        for seed in (0, 1):
            with perturbed_copy(prompt, scale, seed):
                outputs.append(_output(prompt))
        one, other = outputs
        if one is not None and other is not None and not torch.equal(one, other):
            return
    raise _refusal(prompt, "two different prompts give the same output")


def _output(prompt: SoftPrompt) -> Tensor | None:
    """Return the first floating-point tensor in the model's output, or None if none of its values is finite."""
    with prompt.without_objective():
        output: Any = prompt.model(**probe_inputs(prompt), **_without_cache(prompt.model))
    values = [output] if isinstance(output, Tensor) else output.values() if hasattr(output, "values") else output
    found = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None:
        raise _refusal(prompt, f"the model returns a {type(output).__name__} without a floating-point tensor")
    return found if bool(found.isfinite().any()) else None


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Disable the cache for a backward pass, because some models (RWKV) overwrite cached tensors that the backward pass needs."""
    takes = "use_cache" in inspect.signature(unwrapped(model).forward).parameters
    return {"use_cache": False} if takes and torch.is_grad_enabled() else {}


# --- gradients --------------------------------------------------------------------------------------------------------


def _show_gradient(prompt: SoftPrompt) -> None:
    """Check that every part of a copy of the encoder gets a gradient."""
    dead: list[str] = []
    for scale in _SCALES:
        with torch.enable_grad(), perturbed_copy(prompt, scale, seed=0) as encoder:
            dead = _dead_parts(prompt, encoder)
        if not dead:
            return
    raise _refusal(prompt, f"no gradient reaches {_listed(dead)}")


def _dead_parts(prompt: SoftPrompt, encoder: PromptEncoder) -> list[str]:
    """List the parts that get no gradient: parameters of the encoder, and each layer's slice of the encoder's output.

    If a layer runs without gradients (as in some calls of HRM), its slice of a prefix is not trained.
    """
    made: dict[str, Tensor] = {}

    def note(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        made[args[0]] = output = output.view_as(output)  # a view, because the parameter may also be used elsewhere
        return output

    encoder.register_forward_hook(note)
    with _recorded_calls(prompt.model) as called:
        output = _output(prompt)
    if output is None or output.grad_fn is None:
        return ["the prompt, because the output is not finite" if output is None else "any part of the prompt"]
    # Weight the output at random: its plain sum may be constant (a softmax).
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    parameters = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    targets = [*parameters.values(), *made.values()]
    gradients = torch.autograd.grad((output * weights).float().sum(), targets, allow_unused=True)
    dead = [name for name, own in zip(parameters, gradients, strict=False) if not _lives(own)]
    dead = [name for name in dead if name not in encoder.zero_gradient_parameters]
    if prompt.method.has_unused_parameters(prompt.method.probe_arguments()):
        dead = dead if len(dead) == len(parameters) else []
    for group, own in zip(made, gradients[len(parameters) :], strict=True):
        for part in prompt.method.table_slices(prompt.prompted_model.structure, group):
            if part.module in called and not (own is not None and _lives(own[part.rows, part.columns])):
                dead.append(part.name)
    return dead


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Record which modules are called. An expert without tokens, for example, is not called and needs no gradient."""
    called: set[nn.Module] = set()
    with Patches() as patches:
        for part in every_module(model):
            patches.keep(part.register_forward_pre_hook(lambda module, _args: called.add(module)))
        yield called


def _lives(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient.nan_to_num() != 0).any())


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) < 5 else f"{shown} and {len(names) - 4} more"


def _refusal(prompt: SoftPrompt, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{found}; a prompt must change the model's output and, if it is trained, get a gradient.",
        OTHER_METHOD,
        model=type(prompt.model).__name__,
        method=repr(prompt.method),
        stack=", ".join(stack.path or "the model itself" for stack in prompt.prompted_model.structure.stacks),
        found=found,
    )


# --- the copy ---------------------------------------------------------------------------------------------------------


@contextmanager
def perturbed_copy(prompt: SoftPrompt, scale: float, seed: int) -> Iterator[PromptEncoder]:
    """Replace the encoder with a randomly changed copy while the `with` block runs; cached results are not changed."""
    duplicate = copy.deepcopy(prompt.encoder).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        held = [buffer for buffer in duplicate.buffers() if buffer.is_floating_point()]
        for parameter in list(duplicate.parameters()) or held:  # a saved CPT prompt has buffers instead of parameters
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            spread = parameter.float().square().mean().sqrt().clamp(min=0.1, max=10.0).nan_to_num(0.1)
            parameter.add_(noise * (scale * spread).to(parameter))
    with Patches() as patches:
        patches.set(prompt, "_memory", {})
        patches.set(prompt, "_branches", {})
        patches.set(prompt.module._modules, "encoder", duplicate)
        try:
            yield duplicate
        finally:
            unwatch(duplicate)

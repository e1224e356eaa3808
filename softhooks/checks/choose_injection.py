"""Choose the injection of a prompt: the fastest one that is exact for the model."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.backbone.attention_groups import require_sites
from softhooks.backbone.heads import can_generate
from softhooks.backbone.probe_inputs import probe_ids
from softhooks.checks.shared_exactness import shares_exactly
from softhooks.errors import UnsupportedMethodError
from softhooks.inject.branch.linear_scaling import hook_linears, linears
from softhooks.prompt import SoftPrompt
from softhooks.runtime.attached_prompt import Injection

_PROBE_COLUMNS = 5


def probe_inputs(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Return the arguments of a short forward pass: a few tokens, the layout's anchors, and what the method requires."""
    structure = prompt.prompted_model.structure
    ids, columns = prompt.layout.form.probe(probe_ids(prompt.model, structure.vocabulary, _PROBE_COLUMNS))
    return {**structure.example.arguments(ids, torch.ones_like(ids)), **columns, **prompt.method.probe_arguments()}


def choose_injection(prompt: SoftPrompt, asked: Injection | None) -> Injection:
    """Choose the injection, or refuse the requested one if it is not available or not exact for this model."""
    structure = prompt.prompted_model.structure
    if prompt.method.enters == "branch":
        if prompt.method.scales_linears:
            _hook_linears(prompt)
        return _only(prompt, asked, "branch")
    if prompt.method.enters == "attention":
        require_sites(structure)
        through = structure.entry.injection
        assert through is not None
        return _only(prompt, asked, through)
    _refuse_end_of_generation(prompt)
    stack = structure.entry
    could_share = (
        stack.name == "text"
        and stack.causal
        and stack.injection is not None
        and prompt.layout.form.placement == "front"
    )
    if asked == "slots" or not could_share or not shares_exactly(prompt):
        return _only(prompt, asked, "slots")
    return _only(prompt, asked, "shared")


def _hook_linears(prompt: SoftPrompt) -> None:
    """Hook the linear layers that the prompt scales; the hooks are removed with the model's last prompt."""
    for stack in prompt.prompted_model.structure.stacks:
        prompt.prompted_model.expected_modules[stack.name].add(module for module, _ in linears(stack).values())
        for handle in hook_linears(stack):
            prompt.prompted_model.patches.keep(handle)


def _only(prompt: SoftPrompt, asked: Injection | None, possible: Injection) -> Injection:
    if asked not in (None, possible):
        raise UnsupportedMethodError(
            f"injection={asked!r} is not available for {type(prompt.model).__name__}; this prompt can use {possible!r}.",
            "Leave `injection` out.",
            asked=repr(asked),
            possible=repr(possible),
        )
    return possible


def _refuse_end_of_generation(prompt: SoftPrompt) -> None:
    """Refuse a prompt at the end of the text if the model generates text."""
    if prompt.layout.form.has_tail and prompt.prompted_model.structure.entry.causal and can_generate(prompt.model):
        raise UnsupportedMethodError(
            f"{type(prompt.model).__name__} generates text, so a prompt at the end would move as the text grows.",
            "Use placement='front' or 'after_first', or a layout with an anchor or a field after the last slot, such as a field "
            "for the generated text.",
            model=type(prompt.model).__name__,
            placement=prompt.layout if prompt.layout.form.placement == "layout" else "end",
        )

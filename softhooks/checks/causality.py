"""Check during `attach` that a prompt does not change which tokens each token attends to.

In a causal stack, a token attends only to earlier tokens; in an encoder, it attends to the whole text.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from softhooks.backbone.dependence import change_before, is_rounding
from softhooks.backbone.probe_inputs import probe_ids, probe_length
from softhooks.backbone.probing import eval_mode, float_dtype
from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedMethodError
from softhooks.prompt import SoftPrompt


def check_causality(prompt: SoftPrompt) -> None:
    """Check every stack of the model."""
    structure = prompt.prompted_model.structure
    for number, stack in enumerate(structure.stacks):
        # A stack without token ids is never causal.
        calls = None if stack.features is not None else _calls(prompt, stack, number)
        if calls is None:
            continue
        with eval_mode(prompt.model):
            change = _change(prompt, stack, *calls)
        # In a randomly initialized encoder, later tokens may change earlier states only slightly; no change at all means causal.
        if (not is_rounding(change, float_dtype(stack.module))) if stack.causal else change == 0:
            raise _refusal(prompt, stack, change)


def _change(prompt: SoftPrompt, stack: Stack, cut: int, call: dict[str, Tensor], changed: dict[str, Tensor]) -> float:
    """Measure how much the hidden states before token `cut` differ between two calls."""
    forwards = [partial(prompt.model, **call), partial(prompt.model, **changed)]
    change = change_before(stack.module, cut, forwards, stack.state)
    if stack.causal and not is_rounding(change, float_dtype(stack.module)):
        # bitsandbytes chooses 8-bit outliers for the whole batch, so later tokens change how earlier ones are rounded, even
        # without a prompt. Two rows of one batch share their outliers, and so differ only if tokens attend to later ones.
        both = {name: torch.cat([value, changed[name]]) for name, value in call.items()}
        with suppress(Exception):  # some models accept only one row
            change = min(change, change_before(stack.module, cut, [partial(prompt.model, **both)], stack.state))
    return change


def _calls(prompt: SoftPrompt, stack: Stack, number: int) -> tuple[int, dict[str, Tensor], dict[str, Tensor]] | None:
    """Return a token's index, and the arguments of two calls whose ids differ only from this token on; None if none exist."""
    structure, layout = prompt.prompted_model.structure, prompt.layout
    length = layout.num_slots if prompt.method.enters != "branch" else 0
    short = probe_ids(prompt.model, structure.vocabulary, 2)
    anchors = layout.form.probe(short)[0].shape[1] - short.shape[1]
    limits = [limit - length - anchors for limit in map(_max_positions, structure.stacks) if limit is not None]
    limit = min(limits, default=None)
    if limit is not None and limit < short.shape[1]:
        return None
    columns, cut = probe_length(stack.module, limit, length)
    (ids, extra), (other, _) = (
        layout.form.probe(probe_ids(prompt.model, structure.vocabulary, columns, seed)) for seed in (0, 1)
    )
    if other.shape != ids.shape:
        return None
    if layout.form.placement == "layout":
        cut = ids.shape[1] // 2
    late = torch.arange(ids.shape[1], device=ids.device) >= cut
    mixed = torch.where(late, other, ids)
    if torch.equal(mixed, ids):
        return None
    more = {**extra, **prompt.method.probe_arguments()}

    def call(text: Tensor, decoder: Tensor) -> dict[str, Tensor]:
        return {**structure.example.arguments(text, torch.ones_like(ids), decoder), **more}

    if number == 0:
        decoder = ids.roll(1, dims=-1)
        return cut, call(ids, decoder), call(mixed, decoder)
    return cut, call(ids, ids), call(ids, mixed)


def _max_positions(stack: Stack) -> int | None:
    positions = stack.positions
    return positions.limit if positions.limit is not None else positions.trained


def _refusal(prompt: SoftPrompt, stack: Stack, change: float) -> UnsupportedMethodError:
    about = {
        "model": f"{type(prompt.model).__name__} ({stack.path or 'the model itself'})",
        "method": prompt.method.kind,
        "injection": repr(prompt.injection),
    }
    if stack.causal:
        return UnsupportedMethodError(
            "with this prompt, earlier tokens of a causal model depend on later tokens.",
            "Use a method that inserts its virtual tokens into the sequence, such as PromptTuning with injection='slots'.",
            **about,
            found=f"the states of earlier tokens change by {change:.2g} times their size if later ids change",
            because="the model's layers choose by position which tokens to attend to, and the prompt shifts positions",
        )
    return UnsupportedMethodError(
        "with this prompt, tokens of an encoder do not attend to later tokens.",
        "Use another method, or another attention function (`model.set_attn_implementation`).",
        **about,
        found="the states of earlier tokens do not change if later ids change",
    )

"""The table of methods. A new method is one line here, and every property runs over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import zoo

import softhooks
from softhooks import (
    Cartridge,
    ContextAwarePromptTuning,
    ContextTuning,
    Layout,
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
    SoftPrompt,
)
from softhooks.method import Method


@dataclass(frozen=True)
class Entry:
    """One way to use a method.

    Attributes:
        make: builds it for P virtual tokens.
        fits: whether it can enter an architecture with a head.
        wake: changes a new prompt that, by design, has no effect at its initial values.
        extra: the batch columns that a call needs, for rows of these numbers.
    """

    name: str
    make: Callable[[int], Method]
    fits: Callable[[zoo.Case], bool] = lambda case: True
    wake: Callable[[SoftPrompt], None] = lambda prompt: None
    extra: Callable[[Iterable[int]], dict[str, torch.Tensor]] = lambda rows: {}

    def attach(self, model: Any, count: int) -> SoftPrompt:
        """Attach it with P virtual tokens and `wake` it."""
        prompt = softhooks.attach(model, self.make(count))
        self.wake(prompt)
        return prompt

    def __str__(self) -> str:
        return self.name


def _anchored(slots: int, **more: int) -> Layout:
    """Slots in front, and next to a few tokens that only some rows have, so that rows differ in their number of slots."""
    after, before = dict.fromkeys(range(4, 24), 1), {(token,): 1 for token in range(24, 30)}
    return Layout.insert(start=slots, after=after, before=before, missing="skip", **more)


def _template(count: int) -> Method:
    """A template with an LSTM over all of its slots: some before the text, one among its tokens, and one after them."""
    return PTuning(layout=Layout(f"{{soft:{count - 2}}} {{a}} {{soft:1}} {{b}} {{soft:1}} {{mask}}"))


def _slots(rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """Where the slots of a template for four virtual tokens stand in each row of six tokens."""
    return {"soft_slots": torch.tensor([[0, 0, 1 + row % 3, 5] for row in rows])}


def _has_end(case: zoo.Case) -> bool:
    return case.head != "causal"


@torch.no_grad()
def _stir(prompt: SoftPrompt) -> None:
    for parameter in prompt.encoder.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _words(count: int) -> list[int]:
    return torch.randint(4, zoo.VOCABULARY, (count,)).tolist()


def _context(count: int, leave_one_out: bool = False) -> Method:
    shots = [part for part in (_words(count // 2), _words(count - count // 2)) if part]
    return ContextTuning(demonstrations=shots, leave_one_out=leave_one_out, token_dropout=0.1)


def _own_examples(rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """Which of two demonstrations each row is, or that it is none."""
    return {"example_ids": torch.tensor([row % 3 - 1 for row in rows])}


def _own_example(rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """Which rows are the one example."""
    return {"example_ids": torch.tensor([row % 2 - 1 for row in rows])}


def _descriptions(rows: Iterable[int]) -> dict[str, torch.Tensor]:
    """A vector for each row, such as an image encoder makes."""
    return {"prompt_context": torch.stack([torch.arange(5.0).add(row).sin() for row in rows])}


def _cartridge(count: int, **options: Any) -> Method:
    return Cartridge(count, document=_words(count + 5), frozen_slots=min(1, count - 1), **options)


def _has_interface(case: zoo.Case) -> bool:
    return case.arch not in zoo.CACHED


@torch.no_grad()
def _open_gates(prompt: SoftPrompt) -> None:
    for name, parameter in prompt.encoder.named_parameters():
        if not name.endswith("prompts"):
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


def _tasks(rows: Iterable[int]) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.tensor([row % 2 for row in rows])}


def _taught(count: int) -> Method:
    """Two tasks whose teachers train for the first two steps."""
    return MultitaskPromptTuning(count, tasks=2, teachers="train", teacher_steps=2)


def _examples(count: int, **options: Any) -> Method:
    """One example of random words, the last its label."""
    ids = torch.randint(4, zoo.VOCABULARY, (count,)).tolist()
    types = [1, *[2] * (count - 2), 4] if count > 1 else [2]
    return ContextAwarePromptTuning(context_ids=ids, token_types=types, context_loss=count > 1, **options)


def _is_shared(case: zoo.Case) -> bool:
    """Whether all rows can share what a front prompt computes."""
    return case.head == "causal" and case in zoo.CASES


TABLE = [
    Entry("prompt", lambda p: PromptTuning(p)),
    Entry("prompt-random", lambda p: PromptTuning(p, init="random")),
    Entry("prompt-after-first", lambda p: PromptTuning(p, placement="after_first")),
    Entry("prompt-end", lambda p: PromptTuning(p, placement="end"), _has_end),
    Entry("p-tuning", lambda p: PTuning(p)),
    Entry("p-tuning-mlp", lambda p: PTuning(p, encoder="mlp", hidden_size=16)),
    Entry("p-tuning-anchors", lambda p: PTuning(layout=_anchored(p))),
    Entry("p-tuning-anchors-end", lambda p: PTuning(layout=_anchored(p, end=1), encoder="none"), _has_end),
    Entry("prefix", lambda p: PrefixTuning(p)),
    Entry("prefix-random", lambda p: PrefixTuning(p, init="random")),
    Entry("cpt", _examples, _is_shared),
    Entry("prefix-mlp", lambda p: PrefixTuning(p, projection=True, hidden_size=16, dropout=0.1)),
    Entry("p-tuning-v2", lambda p: PTuningV2(p, layers=[-1])),
    Entry("residual", lambda p: ResidualPromptTuning(p, hidden_size=16, dropout=0.1), wake=_stir),
    Entry("context", _context),
    Entry("cartridge", lambda p: _cartridge(p, distill=False)),
    Entry("cartridge-distilled", lambda p: _cartridge(p), _is_shared),
    Entry("adapter", lambda p: LlamaAdapter(p), _has_interface, _open_gates),
    Entry(
        "adapter-v2",
        lambda p: LlamaAdapter(p, num_layers=1, gate="raw", scale_and_bias=True),
        _has_interface,
        _open_gates,
    ),
    Entry("mpt", lambda p: MultitaskPromptTuning(p, tasks=1)),
    Entry("mpt-tasks", lambda p: MultitaskPromptTuning(p, tasks=["a", "b"], rank=2), extra=_tasks),
]

TRAINERS = [
    Entry("prefix-scaled", lambda p: PrefixTuning(p, scaled=p > 1)),
    Entry("p-tuning-v2-projection", lambda p: PTuningV2(p, projection=True, hidden_size=16, dropout=0.1)),
    Entry("mpt-taught", _taught, lambda case: case.head == "causal", extra=_tasks),
    Entry("context-left-out", lambda p: _context(p, leave_one_out=True), extra=_own_examples),
    Entry("cpt-left-out", lambda p: _examples(p, leave_one_out=True), _is_shared, extra=_own_example),
    Entry("adapter-context", lambda p: LlamaAdapter(p, context_size=5), _has_interface, _open_gates, _descriptions),
    Entry("p-tuning-template", _template, extra=_slots),
]
"""Further entries for training: state, columns and random draws that occur only there."""

BY_NAME = {entry.name: entry for entry in (*TABLE, *TRAINERS)}


def fitting(entries: Iterable[Entry], cases: Iterable[zoo.Case]) -> list[tuple[Entry, zoo.Case]]:
    """Every entry with every case that it can enter."""
    cases = list(cases)
    return [(entry, case) for entry in entries for case in cases if entry.fits(case)]


PAIRS = fitting(TABLE, zoo.CASES)
"""Every method on every architecture with every head."""

TRAINED = [BY_NAME["prompt"], BY_NAME["prefix-mlp"]]
"""The entries that are trained with every Trainer option: one without a reparameterization and one with."""

LEARNERS = [*TRAINED, *(entry for entry in (*TABLE, *TRAINERS) if entry not in TRAINED)]
"""The entries that a Trainer trains, logs, saves, resumes after a kill, and evaluates: all of them."""

"""What a check is: it first asks the bare model what can be checked, and then compares the prompted model with that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.survey.case import Case
from benchmarks.survey.kinds import VIRTUAL, Kind
from benchmarks.survey.modalities.text import Text
from benchmarks.survey.modality import Modality, Task, answer, gap
from benchmarks.survey.tiny import pad_id
from softhooks import SoftPrompt

ROUNDING = 2e-4
"""The relative tolerance of two ways of computing the same value."""


@dataclass
class Bare:
    """A model before any prompt, and a batch.

    Attributes:
        output: the bare model's output for the batch.
    """

    case: Case
    task: Task
    modality: Modality
    model: Any
    example: Any
    output: Tensor

    @cached_property
    def heeds_masks(self) -> bool:
        """Whether padding on the right that the mask describes changes nothing, at the lengths with and without a prompt.

        Not for FNet and convolutions, which read padding, nor for attention that keeps the best few keys (`index_topk`), padding
        among them.
        """
        if self.selects_keys:
            return False
        return all(padding_gap(self.model, text, "right") <= ROUNDING for text in self.lengths)

    @property
    def lengths(self) -> tuple[Text, Text]:
        """The text, and a text that is longer by more than a prompt."""
        return self.example, self.example.longer(2 * VIRTUAL)

    @property
    def selects_keys(self) -> bool:
        """Whether attention keeps a fixed number of keys of the text."""
        return getattr(self.model.config.get_text_config(), "index_topk", None) is not None


@dataclass
class Subject:
    """A model with one kind of prompt.

    Attributes:
        prompt: the prompt; None if attach refused it.
    """

    bare: Bare
    kind: Kind
    prompt: SoftPrompt | None = None

    @property
    def refused(self) -> bool:
        """Whether attach refused the prompt."""
        return self.prompt is None

    @property
    def model(self) -> Any:
        """The model."""
        return self.bare.model

    @property
    def example(self) -> Any:
        """The batch."""
        return self.bare.example

    @property
    def structure(self) -> Any:
        """What softhooks knows of the model."""
        assert self.prompt is not None
        return self.prompt.prompted_model.structure

    def answer(self) -> Tensor:
        """The model's output for the batch, as it is now."""
        return answer(self.model, self.example.call())


@dataclass(frozen=True)
class Check:
    """One property of a right prompt.

    Attributes:
        title: what must hold, for the report.
        run: yields a sentence for each thing that does not hold. It gets what `prepare` has returned.
        prepare: asks the bare model; None means that the check does not apply to it. If the bare model raises an error, the check
            does not apply either.
        kinds: the kinds of prompts that have the property; all if empty.
        phase: run it on the prompt as attach made it (`fresh`), after its values were drawn anew (`attached`), or after it was
            removed or refused (`removed`).
        asks_again: whether the bare model is asked again if the check fails: some keep state from earlier calls, prompted or not.
    """

    name: str
    title: str
    run: Callable[[Subject, Any], Iterator[str]]
    prepare: Callable[[Bare], Any] = lambda bare: True
    kinds: tuple[str, ...] = ()
    phase: Literal["fresh", "attached", "removed"] = "attached"
    asks_again: bool = True

    def facts(self, bare: Bare) -> Any:
        """Ask the bare model."""
        forget(bare.model)
        with contextlib.suppress(Exception):  # whatever a bare model says, there is nothing to compare with
            return self.prepare(bare)
        return None


def draw_anew(prompt: SoftPrompt) -> None:
    """Draw every value of a prompt anew, gates that start at zero too, so that all of it matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def padding_gap(model: Any, text: Text, side: str) -> float:
    """How far padding, described by the mask only, moves the output of each row of a ragged batch."""
    call, places = text.ragged(side, pad_id(model))
    found = answer(model, call)
    gaps = []
    for index, place in enumerate(places):
        expected = answer(model, text.row(index).call())
        own = found[index : index + 1]
        if own.dim() == 3 and own.shape[1] == call["input_ids"].shape[1]:
            own = own[:, place]
        gaps.append(gap(own, expected))
    return max(gaps)


def forget(model: Any) -> None:
    """Forget what models with M-RoPE keep of their last call, and add to the positions of the next one (Qwen2-VL and kin)."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None

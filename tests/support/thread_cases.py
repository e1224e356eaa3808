"""A model with a prompt for every way in which a prompt enters, and two calls that differ in their text and their columns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import zoo
from table import BY_NAME
from torch import Tensor

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softhooks.runtime.prompted_model import require_prompted_model


def cases() -> dict[str, tuple[str, str, Any, dict[str, Any], dict[str, Any]]]:
    """For each way: an architecture, a head, a method, and two calls."""
    images = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(3)) * 5
    first, second = zoo.text(1, 6, seed=1), zoo.text(1, 6, seed=2)
    ids = [{"input_ids": one} for one in (first, second)]
    pairs = [{"input_ids": one, "decoder_input_ids": other} for one, other in ((first, second), (second, first))]
    padded = torch.tensor([[0, 0, 1, 1, 1, 1]])
    return {
        "shared": ("llama", "causal", PromptTuning(6), *ids),
        "shared, padded": ("gpt2", "causal", PromptTuning(6), ids[0], {**ids[1], "attention_mask": padded}),
        "shared, made by an LSTM": ("gpt2", "causal", PTuning(4), *ids),
        "slots": ("llama", "causal", PromptTuning(3, placement="after_first"), *ids),
        "slots, padded": ("roberta", "sequence", PromptTuning(3), ids[0], {**ids[1], "attention_mask": padded.flip(1)}),
        "prefix": ("qwen3", "causal", PrefixTuning(4), *ids),
        "windows": ("gemma3", "causal", PrefixTuning(4), *ids),
        "cache": ("gptj", "causal", PrefixTuning(4), *ids),
        "cache, of the last layer": ("gptj", "causal", PTuningV2(4, layers=[-1]), *ids),
        "biased scores": ("bloom", "causal", PrefixTuning(4), *ids),
        "written out": ("deberta", "sequence", PrefixTuning(4), *ids),
        "head": ("bert", "sequence", PromptTuning(4), *ids),
        "context": (
            "llama", "causal", LlamaAdapter(3, context_size=5),
            *({**one, "prompt_context": image} for one, image in zip(ids, images, strict=True)),
        ),
        "scaled layers": ("llama", "causal", LlamaAdapter(3, scale_and_bias=True), *ids),
        "tasks": (
            "llama", "causal", BY_NAME["mpt-tasks"].make(3),
            *({**one, "task_ids": torch.tensor([task])} for task, one in enumerate(ids)),
        ),
        "encoder-decoder": ("t5", "seq2seq", PromptTuning(4), *pairs),
        "prefixes of an encoder-decoder": ("bart", "seq2seq", PrefixTuning(4), *pairs),
        "the stack itself": ("llama", "base", PromptTuning(6), *ids),
    }  # fmt: skip


CASES = cases()


def model_of(way: str) -> Any:
    """The model of a way, without a prompt."""
    arch, head = CASES[way][:2]
    return zoo.build(arch, "causal").base_model if head == "base" else zoo.build(arch, head)


def attach(model: Any, way: str, name: str = "default") -> softhooks.SoftPrompt:
    """Attach the prompt of a way, with values of its own."""
    prompt = softhooks.attach(model, CASES[way][2], name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return prompt


def build(way: str) -> tuple[Any, softhooks.SoftPrompt, list[Callable[[], Tensor]]]:
    """A model with a prompt, the prompt, and the two calls."""
    model = model_of(way)
    prompt = attach(model, way)
    return model, prompt, [lambda call=call: zoo.main_output(model(**call)) for call in CASES[way][3:]]


class Crowd:
    """Threads that all stand in the model at once: each stops at its first call of a module until the others have come.

    Args:
        model: the model.
        module: the module at which they stop.
        count: the number of threads.
    """

    def __init__(self, module: torch.nn.Module, count: int) -> None:
        self._barrier = threading.Barrier(count, self._count_meeting, timeout=300)
        self._own = threading.local()
        self._count = count
        self._handle = module.register_forward_pre_hook(self._stop)
        self.meetings = 0

    def _stop(self, *_call: Any) -> None:
        if getattr(self._own, "comes", False):
            self._own.comes = False
            self._barrier.wait()

    def _count_meeting(self) -> None:
        self.meetings += 1

    def run(self, rounds: list[list[Callable[[], Any]]]) -> list[list[Any]]:
        """Run the calls of each thread, one list for each round, and return their results or errors in the same order."""
        found: list[list[Any]] = [[None] * self._count for _ in rounds]

        def work(number: int) -> None:
            for calls, results in zip(rounds, found, strict=True):
                self._own.comes = True
                try:
                    results[number] = calls[number]()
                except Exception as error:  # noqa: BLE001 - the test looks at it
                    results[number] = error
                    self._barrier.abort()

        threads = [
            threading.Thread(target=work, args=(number,), name=f"worker {number}") for number in range(self._count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._handle.remove()
        return found


class Waits:
    """Notices that a thread waits for the calls of other threads on a model.

    Attributes:
        begun: set when a thread begins to wait.
    """

    def __init__(self, model: Any) -> None:
        self.begun = threading.Event()
        changed = require_prompted_model(model).running._changed
        wait = changed.wait

        def noticed(timeout: float | None = None) -> bool:
            self.begun.set()
            return wait(timeout)

        changed.wait = noticed  # type: ignore[method-assign]

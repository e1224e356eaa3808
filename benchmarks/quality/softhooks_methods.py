"""softhooks' methods as contestants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

import softhooks
from benchmarks.quality import transfer
from benchmarks.quality.baselines import by_turns
from benchmarks.quality.cpt import context_types_and_ids
from benchmarks.quality.inputs import DecoderInputs, Rows
from benchmarks.quality.setup import VIRTUAL_TOKENS, Prepared, Setup
from softhooks.method import Method
from softhooks.trainer.callback import SoftPromptCallback

RUNNER_OPTIONS = frozenset({*transfer.OPTIONS, "freeze_dropout", "bfloat16", "schedule"})
"""Options of a run that the methods do not have."""

LONG = 60
"""The virtual tokens of a long prefix."""

GENERATED_EXAMPLES = 8
"""The examples from which context tuning starts, if answers are generated."""

FROM_VOCABULARY = {"init": "vocab"}
"""The options for a prompt of source tasks, which starts from words of the vocabulary, like the prompt from scratch."""


def with_method(model: PreTrainedModel, method: Method, setup: Setup) -> Prepared:
    """Train a prompt; with the option `freeze_dropout`, without dropout in the frozen model."""
    callback = SoftPromptCallback(method, check_frozen="end", freeze_dropout=setup.options.get("freeze_dropout", False))

    def save(directory: Path) -> None:
        assert callback.soft_prompt is not None  # attached by the callback
        callback.soft_prompt.save_pretrained(directory)

    precise: list[TrainerCallback] = [SetPrecision(callback)] if setup.options.get("bfloat16") else []
    return Prepared(model, [callback, *precise], save)


def prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prompt that starts as the task's instruction; with the option `source_tasks`, as a prompt of these tasks."""
    if "source_tasks" in setup.options:

        def of_sources(names: list[str]) -> Method:
            return softhooks.PromptTuning(**with_options(setup, FROM_VOCABULARY, "init"))

        setup = setup.with_options(init="prompt", init_from=transfer.source_prompt(setup, of_sources))
    return with_method(model, softhooks.PromptTuning(**with_options(setup, starting_words(setup))), setup)


def prefix_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prefix that starts as the keys and values of the task's instruction."""
    return with_method(model, softhooks.PrefixTuning(**with_options(setup, starting_words(setup))), setup)


def long_prefix_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prefix of 60 tokens, which has the number of parameters of a small LoRA."""
    return prefix_tuning(model, setup.with_options(num_virtual_tokens=LONG))


def scaled_prefix_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prefix that is trained in units of its initial spread."""
    return prefix_tuning(model, setup.with_options(scaled=True))


def long_scaled_prefix_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prefix of 60 tokens that is trained in units of its initial spread."""
    return long_prefix_tuning(model, setup.with_options(scaled=True))


def p_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make virtual tokens in front; with the options `start` and `before_question`, in front and before the question."""
    if "start" in setup.options:
        assert isinstance(setup.inputs, DecoderInputs)
        question = tuple(setup.inputs.question_part())
        start, before = setup.options["start"], setup.options["before_question"]
        layout = softhooks.Layout.insert(start=start, before={question: before} if before else None, which="last")
        return with_method(model, softhooks.PTuning(layout=layout), setup)
    return with_method(model, softhooks.PTuning(**with_options(setup, {})), setup)


def p_tuning_v2(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make keys and values in all layers, or in `layers`."""
    return with_method(model, softhooks.PTuningV2(**with_options(setup, {})), setup)


def multitask_prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a multitask prompt with one task; with the option `source_tasks`, adapted from a prompt of these tasks."""
    own: dict[str, Any] = {"tasks": 1, **starting_words(setup)}
    if "source_tasks" in setup.options:

        def of_sources(names: list[str]) -> Method:
            options = {"tasks": names, "sampling": None, **FROM_VOCABULARY}
            return softhooks.MultitaskPromptTuning(**with_options(setup, options))

        own = {"tasks": 1, "source": transfer.source_prompt(setup, of_sources)}
        setup = setup.without_options("teachers", "teacher_steps")
    return with_method(model, softhooks.MultitaskPromptTuning(**with_options(setup, own)), setup)


def llama_adapter(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make an adapter; the option `gates` sets the initial gates."""
    gates = setup.options.get("gates", "zero")
    prepared = with_method(model, softhooks.LlamaAdapter(**with_options(setup.without_options("gates"), {})), setup)
    if gates != "zero":
        prepared.callbacks.append(SetGates(prepared.callbacks[0], gates))
    return prepared


def llama_adapter_v2(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make an adapter that also trains a factor and an offset for the output of every linear layer."""
    return llama_adapter(model, setup.with_options(scale_and_bias=True))


def residual_prompt_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prompt that an MLP computes from the task's instruction."""
    return with_method(model, softhooks.ResidualPromptTuning(**with_options(setup, starting_words(setup))), setup)


def cpt(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a context of as many training rows as fit into `CONTEXT_LIMIT` tokens (`baselines.py`)."""
    assert isinstance(setup.inputs, DecoderInputs)
    types, ids = context_types_and_ids(setup.inputs, setup.rows)
    options: dict[str, Any] = {"context_ids": ids, "token_types": types, **setup.options}
    return with_method(model, softhooks.ContextAwarePromptTuning(**options), setup)


def context_tuning(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a prefix that starts as one example of each class; these are training rows, which do not attend to themselves."""
    assert isinstance(setup.inputs, DecoderInputs)
    shown = by_turns(setup.task, setup.rows)[: len(setup.task.labels) or GENERATED_EXAMPLES]
    prepared = with_method(
        model,
        softhooks.ContextTuning(demonstrations=[setup.inputs.example(row) for row in shown], **setup.options),
        setup,
    )
    numbers = {id(row): number for number, row in enumerate(shown)}
    rows = setup.inputs.dataset(setup.rows).rows
    own = [{**encoded, "example_ids": numbers.get(id(row), -1)} for encoded, row in zip(rows, setup.rows, strict=True)]
    return Prepared(model, prepared.callbacks, prepared.save, dataset=Rows(own))


def cartridge(model: PreTrainedModel, setup: Setup) -> Prepared:
    """Make a cartridge of the task's document, trained on questions in all templates but the first, which is for the test."""
    assert isinstance(setup.inputs, DecoderInputs)
    prepared = with_method(model, softhooks.Cartridge(document=setup.inputs.document(), **setup.options), setup)
    rows = []
    for index in range(1, len(setup.task.templates)):
        rows += DecoderInputs(setup.task.with_template(index), setup.inputs.tokenizer).dataset(setup.rows).rows
    return Prepared(model, prepared.callbacks, prepared.save, dataset=Rows(rows), keep=True)


class SetPrecision(TrainerCallback):
    """Convert the trained parameters to bfloat16 before the first step."""

    def __init__(self, attached: TrainerCallback) -> None:
        self.attached = attached

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert isinstance(self.attached, SoftPromptCallback)
        assert self.attached.soft_prompt is not None
        self.attached.soft_prompt.encoder.to(torch.bfloat16)


class SetGates(TrainerCallback):
    """Replace the gates of a LLaMA-Adapter before the first step, by ones or by samples from N(0, 1)."""

    def __init__(self, attached: TrainerCallback, start: str) -> None:
        self.attached, self.start = attached, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert isinstance(self.attached, SoftPromptCallback)
        assert self.attached.soft_prompt is not None
        with torch.no_grad():
            for name, gates in self.attached.soft_prompt.encoder.named_parameters():
                if name.endswith("gates"):
                    gates.fill_(1.0) if self.start == "one" else gates.normal_()


def starting_words(setup: Setup) -> dict[str, Any]:
    """Return the options for a prompt that starts as the instruction of the task."""
    return {"init": "text", "init_text": setup.task.instruction, "tokenizer": setup.inputs.tokenizer}


def as_chat(setup: Setup) -> str:
    """Return the task's instruction as a user's message in the chat template, and the beginning of the answer."""
    text: str = setup.inputs.tokenizer.apply_chat_template(
        [{"role": "user", "content": setup.task.instruction}], tokenize=False, add_generation_prompt=True
    )
    return text


def with_options(setup: Setup, own: dict[str, Any], *left_out: str) -> dict[str, Any]:
    """Return the options of a method: its own, then those of the run; an `init` of the run replaces the method's own."""
    given = {name: value for name, value in setup.options.items() if name not in (*left_out, *RUNNER_OPTIONS)}
    init = given.get("init")
    if init is not None:
        own = {name: value for name, value in own.items() if not name.startswith("init_")}
        if init in ("text", "chat"):
            own["init_text"] = setup.task.instruction if init == "text" else as_chat(setup)
            given = {**given, "init": "text"}
        elif init == "class_labels":
            own["init_labels"] = list(setup.task.labels)
        else:
            own.pop("tokenizer", None)
    return {"num_virtual_tokens": VIRTUAL_TOKENS, **own, **given}

"""Run the demo: baselines without training, then a soft prompt and a prefix; compare them, and load the saved prompts."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import transformers
from rich.console import Console
from transformers import PreTrainedModel

from softhooks.demo.corpus import Row, read_corpus
from softhooks.demo.language_model.curves import plot_curves
from softhooks.demo.language_model.predict import Predictions, generate, predict, standard_error
from softhooks.demo.language_model.report import Example, Line, Reloaded, Report, print_report
from softhooks.demo.language_model.task import CODE, QUESTION, Rows, Task, make_task
from softhooks.demo.language_model.train import Recipe, TrainedPrompt, train_prompt
from softhooks.demo.models import Checkpoint
from softhooks.demo.options import LanguageModelOptions
from softhooks.demo.report_file import as_text, print_missing, versions, write_report
from softhooks.demo.smollm2 import smollm2
from softhooks.demo.tiny_models import tiny_decoder
from softhooks.load import load
from softhooks.method import Method
from softhooks.methods import PrefixTuning, PromptTuning

PROMPT = "prompt-tuning"
PREFIX = "prefix-tuning"
SHOTS = 1
"""Examples of each package in the context of the few-shot baselines; with three, this model answers worse."""
SHOWN = 3
"""Rows for which the report shows the generated answers."""
RELOADED = 64
"""Test rows on which a loaded prompt is compared with the trained one; a multiple of the batch size of `predict`."""
QUICK_ROWS, QUICK_STEPS = Rows(train=20, development=2, test=4), 10


@dataclass(frozen=True)
class Trained:
    """A trained prompt, its predictions for the test rows, and the generated answers that the report shows."""

    run: TrainedPrompt
    predictions: Predictions
    answers: list[str]


def run_demo(options: LanguageModelOptions, console: Console | None = None) -> Report:
    """Run the demo: print the results, and write them to `report.json`.

    Nothing is written outside `options.output`, except for the converted model in the user's cache directory.

    Raises:
        SoftHooksError: a package is missing, the model is unsuitable, or a frozen tensor has changed.
    """
    console = console or Console()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint, task = _prepare(options, console)
    shown = random.Random(options.seed).sample(task.test, min(SHOWN, len(task.test)))
    model = checkpoint.language_model()
    baselines = _baselines(model, task, options, console)
    before = [generate(model, task, row, task.context(0, options.seed)) for row in shown]
    del model
    trained = _train_all(checkpoint, task, shown, options, console)
    curves = options.output / "curves.png"
    accuracies = {line.name: line.accuracy for line in baselines}
    learned = {name: result.run.curves for name, result in trained.items()}
    plot_curves(learned, accuracies, curves, f"{checkpoint.name}: packages of docstrings")
    report = Report(
        model=checkpoint.name,
        train_rows=len(task.train),
        test_rows=len(task.test),
        lines=baselines + [_line(name, result) for name, result in trained.items()],
        examples=[
            Example(row.text, row.package, *answers)
            for row, *answers in zip(shown, before, next(iter(trained.values())).answers, strict=True)
        ],
        reloaded=_compare_reloaded(checkpoint, task, shown, trained, console),
        model_path=checkpoint.path,
        format=task.format,
        curves=str(curves),
        versions=versions(),
        options=as_text(options),
    )
    write_report(report, options.output)
    print_report(report, options.output, console)
    return report


def _prepare(options: LanguageModelOptions, console: Console) -> tuple[Checkpoint, Task]:
    """Choose the model, read the texts, and describe the task."""
    corpus = read_corpus()
    print_missing(corpus, console)
    if options.model is not None:
        checkpoint = Checkpoint(options.model, options.model)
    elif options.quick:
        texts = [f"{CODE.before}{row.text}{CODE.after} {row.package}" for row in corpus.rows]
        checkpoint = tiny_decoder(texts, options.output / "tiny-model")
    else:
        checkpoint = smollm2(console)
    task = make_task(
        corpus,
        checkpoint.tokenizer(),
        max_length=options.max_length,
        seed=options.seed,
        rows_per_package=QUICK_ROWS if options.quick else Rows(),
    )
    console.print(
        f"[bold]{checkpoint.name}[/] has to name the package of Python's standard library that a docstring comes from "
        f"({', '.join(task.labels)}): {len(task.train)} training and {len(task.test)} test rows, from different files.\n"
    )
    return checkpoint, task


def _baselines(model: PreTrainedModel, task: Task, options: LanguageModelOptions, console: Console) -> list[Line]:
    """Ask the model without training: as a question and as code, without and with examples in the context."""
    console.print("[bold]1/3[/] the model without training")
    lines = [_majority(task)]
    for shots, form in itertools.product((0, SHOTS), (QUESTION, CODE)):
        start = time.perf_counter()
        asked = dataclasses.replace(task, format=form)
        context = asked.context(shots, options.seed)
        name = f"{'few-shot' if shots else 'zero-shot'}, {form.name}"
        predictions = predict(model, asked, task.test, context, description=name)
        seconds = time.perf_counter() - start
        lines.append(Line(name, predictions.accuracy, predictions.standard_error, seconds, len(context)))
    return lines


def _majority(task: Task) -> Line:
    """Answer with the most frequent package of the training rows."""
    [(package, _)] = Counter(row.package for row in task.train).most_common(1)
    accuracy = sum(row.package == package for row in task.test) / len(task.test)
    return Line("majority class", accuracy, standard_error(accuracy, len(task.test)))


def _train_all(
    checkpoint: Checkpoint, task: Task, shown: Sequence[Row], options: LanguageModelOptions, console: Console
) -> dict[str, Trained]:
    """Train a soft prompt and a prefix; both begin as the instruction's first tokens."""
    count = options.num_virtual_tokens
    prompt = PromptTuning(count, init="text", init_text=task.instruction, tokenizer=task.tokenizer)
    prefix = PrefixTuning(count, init="text", init_text=task.instruction, tokenizer=task.tokenizer)
    runs: list[tuple[str, Method, float, str]] = [
        (f"soft prompt, {count} tokens", prompt, options.prompt_learning_rate, PROMPT),
        (f"prefix, {count} tokens", prefix, options.prefix_learning_rate, PREFIX),
    ]
    steps = QUICK_STEPS if options.quick else options.steps
    trained = {}
    for number, (name, method, rate, directory) in enumerate(runs, start=2):
        console.print(f"\n[bold]{number}/3[/] a {name}")
        recipe = Recipe(steps, rate, options.batch_size, options.seed)
        run = train_prompt(method, checkpoint, task, recipe, options.output / directory)
        predictions = predict(run.model, task, task.test, description="test rows")
        trained[name] = Trained(run, predictions, [generate(run.model, task, row) for row in shown])
    return trained


def _line(name: str, result: Trained) -> Line:
    return Line(
        name,
        result.predictions.accuracy,
        result.predictions.standard_error,
        result.run.seconds,
        context_tokens=0,
        trained=result.run.parameters,
        saved_bytes=result.run.saved_bytes,
        frozen_tensors=result.run.frozen.tensors,
        frozen_bytes=result.run.frozen.bytes,
    )


def _compare_reloaded(
    checkpoint: Checkpoint, task: Task, shown: Sequence[Row], trained: dict[str, Trained], console: Console
) -> list[Reloaded]:
    """Load each saved prompt onto a fresh model, and compare its answers with those after training."""
    console.print("\n[bold]The saved prompts, loaded onto fresh models[/]")
    compared = []
    for name, result in trained.items():
        model = checkpoint.language_model()
        load(model, result.run.directory)
        predictions = predict(model, task, task.test[:RELOADED], description=name)
        before = result.predictions.first(len(predictions.logits))
        answers = [generate(model, task, row) for row in shown]
        compared.append(
            Reloaded(
                name,
                str(result.run.directory),
                same=int((predictions.classes == before.classes).sum()),
                rows=len(before.logits),
                same_texts=sum(answer == trained for answer, trained in zip(answers, result.answers, strict=True)),
                texts=len(shown),
                largest_difference=float(np.abs(predictions.logits - before.logits).max()),
            )
        )
    return compared

"""Run the demo: train a head, a soft prompt and a prefix, compare them, and load the saved prompts."""

from __future__ import annotations

import numpy as np
import transformers
from rich.console import Console

from softhooks.demo.corpus import read_corpus
from softhooks.demo.encoder.baselines import logistic_regression, majority_class
from softhooks.demo.encoder.data import EncodedData, encode
from softhooks.demo.encoder.report import Line, Reloaded, Report, print_report
from softhooks.demo.encoder.train import Recipe, Result, load_and_predict, train_head, train_soft_prompt
from softhooks.demo.models import Checkpoint, minilm
from softhooks.demo.options import EncoderOptions
from softhooks.demo.report_file import as_text, print_missing, versions, write_report
from softhooks.demo.tiny_models import tiny_encoder
from softhooks.methods import PrefixTuning, PromptTuning

HEAD = "head"
PROMPT = "prompt-tuning"
PREFIX = "prefix-tuning"
QUICK_ROWS = 160
QUICK_EPOCHS = 1


def run_demo(options: EncoderOptions, console: Console | None = None) -> Report:
    """Print the results, and write them to `report.json`; nothing is written outside `options.output`."""
    console = console or Console()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoint, data = _prepare(options, console)
    baselines = [majority_class(data), logistic_regression(checkpoint.encoder(), data, batch_size=64)]
    results = _train_all(options, checkpoint, data, console)
    report = Report(
        model=checkpoint.name,
        train_rows=len(data.train),
        test_rows=len(data.test),
        lines=baselines + [_line(name, result, data) for name, result in results.items()],
        reloaded=_compare_reloaded(options, checkpoint, data, results, console),
        versions=versions(),
        options=as_text(options),
    )
    write_report(report, options.output)
    print_report(report, options.output, console)
    return report


def _prepare(options: EncoderOptions, console: Console) -> tuple[Checkpoint, EncodedData]:
    """Choose the model, read and tokenize the texts, and describe the task."""
    corpus = read_corpus()
    print_missing(corpus, console)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.model is not None:
        checkpoint = Checkpoint(options.model, options.model)
    elif options.quick:
        checkpoint = tiny_encoder([row.text for row in corpus.rows], options.output / "tiny-model")
    else:
        checkpoint = minilm()
    limit = QUICK_ROWS if options.quick else None
    data = encode(corpus, checkpoint.tokenizer(), options.max_length, options.test_fraction, options.seed, limit)
    console.print(
        f"[bold]{checkpoint.name}[/] classifies docstrings of Python's standard library by package "
        f"({', '.join(data.labels)}): {len(data.train)} training and {len(data.test)} test rows, from different files.\n"
    )
    return checkpoint, data


def _train_all(
    options: EncoderOptions, checkpoint: Checkpoint, data: EncodedData, console: Console
) -> dict[str, Result]:
    tokens = options.num_virtual_tokens
    console.print("[bold]1/3[/] the head alone")
    recipe = _recipe(options, options.head_epochs, options.head_learning_rate)
    head = train_head(checkpoint, data, recipe, options.output / HEAD)
    console.print(f"\n[bold]2/3[/] a soft prompt of {tokens} virtual tokens, and the head")
    recipe = _recipe(options, options.prompt_epochs, options.prompt_learning_rate)
    prompt = train_soft_prompt(PromptTuning(tokens), checkpoint, data, recipe, options.output / PROMPT)
    console.print(f"\n[bold]3/3[/] a prefix of {tokens} virtual tokens in every layer, and the head")
    recipe = _recipe(options, options.prefix_epochs, options.prefix_learning_rate)
    prefix = train_soft_prompt(PrefixTuning(tokens), checkpoint, data, recipe, options.output / PREFIX)
    return {"head alone": head, f"soft prompt, {tokens} tokens": prompt, f"prefix, {tokens} tokens": prefix}


def _line(name: str, result: Result, data: EncodedData) -> Line:
    return Line(
        name,
        accuracy=float(np.mean(result.logits.argmax(-1) == data.test.labels)),
        trained=result.trained,
        seconds=result.seconds,
        checkpoint_bytes=result.checkpoint_bytes,
        frozen_tensors=result.frozen.tensors,
        frozen_bytes=result.frozen.bytes,
    )


def _compare_reloaded(
    options: EncoderOptions, checkpoint: Checkpoint, data: EncodedData, results: dict[str, Result], console: Console
) -> list[Reloaded]:
    """Load each saved prompt onto a fresh model, and compare the logits with those computed after training."""
    console.print("\n[bold]The saved prompts, loaded into fresh models[/]")
    compared = []
    for name, result in results.items():
        if result.checkpoint.name != HEAD:
            logits = load_and_predict(checkpoint, data, options.seed + 1, result.checkpoint)
            same = int((logits.argmax(-1) == result.logits.argmax(-1)).sum())
            difference = float(np.abs(logits - result.logits).max())
            compared.append(Reloaded(name, str(result.checkpoint), same, len(data.test), difference))
    return compared


def _recipe(options: EncoderOptions, epochs: float, learning_rate: float) -> Recipe:
    return Recipe(QUICK_EPOCHS if options.quick else epochs, learning_rate, options.batch_size, options.seed)

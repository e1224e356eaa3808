"""`python -m benchmarks.metamath --experiment prompt-tuning`, or `--all`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.metamath import experiment as experiments
from benchmarks.metamath.settings import ExperimentError, Settings, parse_changes

_CANCELED = 130  # the exit status of a command that Ctrl-C ended
HERE = Path(__file__).parent


def main(
    experiment: Annotated[
        list[str] | None,
        typer.Option(help="An experiment, or a folder of experiments such as prompt-tuning; may be repeated."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all experiments, each in its own process.")] = False,
    list_names: Annotated[bool, typer.Option("--list", help="List the experiments and exit.")] = False,
    model: Annotated[str | None, typer.Option(help="Another model: a directory, or a repository on the Hub.")] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="A directory of JSON lines instead of the data on the Hub; see data.py.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A training setting, such as max_steps=100; may be repeated.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Results go to subdirectories of this directory.")] = HERE,
    checkpoints: Annotated[Path | None, typer.Option(help="Keep what was trained in this directory.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the Hub's cache only.")] = False,
) -> None:
    """Train on MetaMathQA and test on GSM8K, with softhooks and the settings of PEFT's method comparison.

    Needs a GPU with 32 GB, and access to meta-llama/Llama-3.2-3B on the Hub. The exit status is 1 if a run fails.
    """
    if list_names:
        typer.echo("\n".join(experiments.names()))
        return
    try:
        chosen = experiments.choose(experiment or [], every)
        changes = parse_changes(change or []) | ({} if model is None else {"model_id": model})
        local = dataset_dir is not None and model is not None and Path(model).is_dir()
        # `benchmarks` turns the Hub off; this has to come before the first import of huggingface_hub
        os.environ["HF_HUB_OFFLINE"] = "1" if offline or local else "0"
        if len(chosen) > 1:
            settings_given = [part for item in change or [] for part in ("--set", item)]
            shared = _flags(model=model, dataset_dir=dataset_dir, output=output, checkpoints=checkpoints)
            offline_flag = ["--offline"] if offline else []
            raise typer.Exit(_each_in_a_process(chosen, [*settings_given, *shared, *offline_flag]))
        read = experiments.read_experiment(experiments.EXPERIMENTS / f"{chosen[0]}.json")
        settings = Settings.of(read.training, changes)
    except ExperimentError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error

    from benchmarks.metamath.run import Places, run

    outcome, path = run(read, settings, Places(dataset_dir, output, checkpoints))
    typer.echo(f"{read.label}: {outcome.status}{f', {outcome.error}' if outcome.error else ''}; written to {path}")
    if outcome.status != "success":
        raise typer.Exit(_CANCELED if outcome.status == "canceled" else 1)
    note = f" (PEFT: {read.published['test_accuracy']:.3f})" if read.published and path.parent.name == "results" else ""
    typer.echo(f"test accuracy {outcome.log.metrics[-1]['test accuracy']:.3f}{note}")


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _each_in_a_process(names: list[str], arguments: list[str]) -> int:
    """Run experiments one after the other and return the exit status; a process of its own gives each its own peak memory."""
    failed = []
    # Ctrl-C also reaches the run, which records it; without a handler, this process would kill the run before that
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        for name in names:
            command = [sys.executable, "-m", "benchmarks.metamath", "--experiment", name, *arguments]
            status = subprocess.run(command, check=False).returncode
            if status in (_CANCELED, -signal.SIGINT):
                return _CANCELED
            if status:
                failed.append(name)
    finally:
        signal.signal(signal.SIGINT, previous)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
    return 1 if failed else 0


if __name__ == "__main__":
    typer.run(main)

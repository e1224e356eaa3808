"""Measure, show, write and check: `python -m benchmarks`, or `python -m benchmarks --quick`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    distillation,
    exactness,
    few_shot,
    frozen,
    generation,
    memory,
    report,
    training_step,
    transfer,
    zero_gate,
)
from benchmarks.profiles import FULL, QUICK, Profile
from benchmarks.result import Result, today

BENCHMARKS: dict[str, Callable[[Profile, Progress], Result]] = {
    "exactness": exactness.run,
    "training_step": training_step.run,
    "memory": memory.run,
    "generation": generation.run,
    "frozen": frozen.run,
    "zero_gate": zero_gate.run,
    "few_shot": few_shot.run,
    "transfer": transfer.run,
    "distillation": distillation.run,
}
RESULTS = Path(__file__).parent / "results"


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds; writes nothing unless --output is given.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Exit with status 1 if a target does not hold.")] = True,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(BENCHMARKS)}; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the results go; benchmarks/results otherwise.")] = None,
) -> None:
    """Measure softhooks against PEFT and the bare frozen model, side by side in one run."""
    console = Console()
    chosen = only or list(BENCHMARKS)
    if unknown := [name for name in chosen if name not in BENCHMARKS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}", param_hint="--only")
    profile = QUICK if quick else FULL
    transformers.logging.set_verbosity_error()
    results = measure(profile, chosen, console)
    folder = output or (None if quick else RESULTS)
    if folder is not None:
        write(results, folder, profile)
        console.print(f"Written to {folder}.")
    missed = report.missed(results)
    for target in missed:
        console.print(f"[bold red]missed[/] {target}", highlight=False)
    if missed and check:
        raise typer.Exit(1)


def measure(profile: Profile, names: list[str], console: Console) -> list[Result]:
    """Run benchmarks one after the other, each with a progress bar, and show each table."""
    console.print(report.surroundings(), highlight=False)
    results = []
    for name in names:
        bar = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Progress(*bar, console=console, transient=True) as progress:
            results.append(BENCHMARKS[name](profile, progress))
        report.show(results[-1], console)
    return results


def write(results: list[Result], folder: Path, profile: Profile) -> None:
    """Write every result; the page of tables only if it is whole."""
    for result in results:
        result.write(folder, profile)
    if len(results) == len(BENCHMARKS):
        report.write_markdown(results, folder, today())


if __name__ == "__main__":
    typer.run(main)

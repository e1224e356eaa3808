"""Run what has no result yet, and write the report: `python -m benchmarks.quality`."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.quality.findings import FINDINGS
from benchmarks.quality.findings.rates import rate_runs
from benchmarks.quality.plan import PROFILES, baseline_runs, final_runs, prompt_runs, prompted_runs, search_runs
from benchmarks.quality.pool import execute_all
from benchmarks.quality.records import Run, Store
from benchmarks.quality.report import write_report
from benchmarks.quality.same_rate import same_rate_runs

RESULTS = Path(__file__).parent / "results"
console = Console()
app = typer.Typer(add_completion=False)


@app.command()
def main(
    profile: Annotated[str, typer.Option(help="`small` (minutes) or `full` (hours on two cores).")] = "small",
    output: Annotated[Path, typer.Option(help="The directory of results and report.")] = RESULTS,
    only: Annotated[
        str,
        typer.Option(
            help="Execute only runs whose file name matches this regular expression, such as `glosses-smollm2`."
        ),
    ] = "",
    workers: Annotated[int, typer.Option(min=1, help="Runs in parallel.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each run.")] = 1,
    minutes: Annotated[float, typer.Option(help="Start no run after this time; the next call continues.")] = float(
        "inf"
    ),
    findings: Annotated[
        bool, typer.Option(help="Also execute the experiments on the papers' findings (`full` only).")
    ] = True,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
) -> None:
    """Measure how well prompts tune real models, against baselines, LoRA and PEFT.

    Each run is written to a file of its own. Runs that have a file are not repeated, so an interrupted benchmark continues where
    it stopped. First the baselines are scored; then learning rates are chosen on the development rows; then the runs with these
    rates are scored on the test rows, and methods whose rate differs from that of PEFT's version are scored with PEFT's rate
    too. Then come the experiments on the papers' findings, which are not part of the small profile.
    """
    chosen, store = PROFILES[profile], Store(output / profile)
    deadline = time.monotonic() + 60 * minutes
    failed: list[Run] = []

    def go(title: str, runs: Sequence[Run]) -> None:
        matching = [run for run in store.missing(runs) if re.search(only, run.file)]
        failed.extend(execute_all(title, matching, store, console, workers, threads, deadline))

    go("baselines", baseline_runs(chosen))
    go("prompts", prompt_runs(chosen))
    while remaining := store.missing(search_runs(chosen, store)):  # the results may add rates
        go("learning rates", remaining)
        if store.missing(remaining) == remaining:  # excluded by --only, failed, or after the deadline
            break
    go("test", [*prompted_runs(chosen, store), *final_runs(chosen, store)])
    go("PEFT's learning rates", same_rate_runs(chosen, store))
    judged = FINDINGS if findings and chosen.findings else ()
    go("learning rates of findings", rate_runs() if judged else [])
    go("findings", [run for finding in judged for run in finding.runs])
    if report:
        console.print(f"Report: {write_report(store, chosen, output / profile, judged)}", soft_wrap=True)
    for run in failed:
        console.print(f"[red]failed:[/] {run.file}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()

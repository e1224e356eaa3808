"""Survey every architecture in transformers' Auto mappings: `python -m benchmarks.survey`."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.survey.apart import Found, examine_apart
from benchmarks.survey.case import Case
from benchmarks.survey.kinds import KINDS
from benchmarks.survey.modalities import TASKS
from benchmarks.survey.report import write_report
from benchmarks.survey.store import RESULTS, Store, read_tasks, write_task

console = Console(soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def main(
    tasks: Annotated[str, typer.Option(help=f"Names of tasks: {', '.join(TASKS)}. All by default.")] = "",
    only: Annotated[str, typer.Option(help="Values of `model_type`, such as `llama gpt2`. All by default.")] = "",
    kinds: Annotated[str, typer.Option(help=f"Kinds of prompts: {', '.join(KINDS)}. All by default.")] = "",
    profile: Annotated[
        str, typer.Option(help="`full`, or `sample`: the hundred cases that `make test` examines.")
    ] = "full",
    jobs: Annotated[int, typer.Option(min=1, help="Models to examine at once, one core each.")] = 2,
    seconds: Annotated[int, typer.Option(min=1, help="The time limit of each model.")] = 120,
    minutes: Annotated[float, typer.Option(help="Start no model after this time; the next call continues.")] = float(
        "inf"
    ),
    again: Annotated[bool, typer.Option("--again", help="Examine models that have a result, too.")] = False,
    output: Annotated[Path, typer.Option(help="The directory of the result files.")] = RESULTS,
) -> None:
    """Attach every kind of prompt to a tiny model of every architecture, and check what must hold.

    Each row (a model, a head and a kind of prompt) is *right*, *refused* by `attach` with a sentence, or *wrong* in a check: the
    gradients, the rows put among the text's embeddings by hand, padding, causality, caches, and more. The models are made from
    configs with random weights; nothing is downloaded. The whole survey takes some 30 minutes on two idle cores.

    Names are separated by spaces or commas:

        make survey SURVEY_ARGS='--tasks "causal masked" --only "llama bert"'

        make survey SURVEY_ARGS="--profile sample"

    An interrupted survey continues where it stopped, as long as the code is the same. A task whose models are all done is written
    to the result files, and the report next to them is made from all result files. What is refused or wrong is printed at once;
    the exit status is 1 if a row is wrong or a model did not finish.
    """
    store, chosen_kinds = Store(), _names(kinds, KINDS)
    cases = list(_cases(_names(tasks, TASKS) or list(TASKS), _names(only, None), profile))
    found = _examine_all(cases, chosen_kinds, store, jobs, seconds, time.monotonic() + 60 * minutes, again)
    for task in TASKS.values():
        complete = {arch: store.latest(Case(task.name, arch)) for arch in task.architectures}
        if any(case.task == task.name for case in cases) and all(map(_has_all_kinds, complete.values())):
            console.print(f"written: {write_task(task, complete, output)}")
    results, found_with = read_tasks(list(TASKS.values()), output)
    if results:
        console.print(f"report:  {write_report(results, found_with, output.parent / 'README.md')}")
    if not _summarize(found):
        raise typer.Exit(1)


def _names(text: str, known: dict[str, Any] | None) -> list[str]:
    names = re.findall(r"[^\s,]+", text)
    if known is not None and (unknown := [name for name in names if name not in known]):
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    return names


def _cases(tasks: Sequence[str], only: Sequence[str], profile: str) -> Iterator[Case]:
    if profile == "sample":
        from tests.survey.sample import SAMPLE

        yield from (case for case in SAMPLE if case.task in tasks and (not only or case.arch in only))
    elif profile == "full":
        for task in tasks:
            yield from (Case(task, arch) for arch in TASKS[task].architectures if not only or arch in only)
    else:
        raise typer.BadParameter(f"the profile {profile!r} is neither `full` nor `sample`")


def _has_all_kinds(found: Found | None) -> bool:
    return found is not None and ("not built" in found or "not finished" in found or set(KINDS) <= found.keys())


def _examine_all(
    cases: Sequence[Case],
    kinds: Sequence[str],
    store: Store,
    jobs: int,
    seconds: int,
    deadline: float,
    again: bool,
) -> dict[Case, Found]:
    """Examine the models that have no result yet, print what is not right, and return what was found of each."""
    wanted = set(kinds or KINDS)
    found = {case: known for case in cases if not again and (known := store.get(case))}
    found = {case: known for case, known in found.items() if "not built" in known or wanted <= known.keys()}
    for case, known in found.items():
        _print(case, known, wanted)
    waiting = [case for case in reversed(cases) if case not in found]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        bar = progress.add_task("survey", total=len(cases), completed=len(found))
        running: dict[Future[Found], Case] = {}
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                case = waiting.pop()
                running[pool.submit(examine_apart, case, kinds or None, seconds)] = case
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                case = running.pop(future)
                found[case] = future.result()
                store.put(case, found[case])
                progress.update(bar, advance=1, description=str(case))
                _print(case, found[case], wanted)
    return found


def _print(case: Case, found: Found, kinds: set[str]) -> None:
    for name, row in found.items():
        if isinstance(row, str):
            console.print(f"{case} | {name}: {row}", markup=False, highlight=False)
        elif name in kinds and row["verdict"] != "right":
            said = row.get("wrong") or row["refusal"]
            console.print(f"{case} | {name} | {row['verdict']}: {said}", markup=False, highlight=False)


def _summarize(found: dict[Case, Found]) -> bool:
    """Print counts; return whether nothing is wrong."""
    counts: Counter[str] = Counter()
    for rows in found.values():
        for name, row in rows.items():
            if isinstance(row, dict):
                counts[f"{name}: {row['verdict']}"] += 1
            elif isinstance(row, str):
                counts[f"models {name}"] += 1
    for name, count in sorted(counts.items()):
        console.print(f"{count:5d}  {name}", highlight=False)
    return not any(name.endswith(("wrong", "not finished")) for name in counts)


if __name__ == "__main__":
    app()

"""Survey every architecture in transformers' Auto mappings: `python -m tests.survey --tasks causal --only llama gpt2`.

Each model is built and examined in a process of its own, which ends after a while whatever happens; so one that dies or hangs
costs its own row and no other.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import Progress

from tests.survey import models
from tests.survey.apart import examine_apart
from tests.survey.findings import Case


def main() -> int:
    """Run the survey and print a line for each model on which a check fails. -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", nargs="+", choices=list(models.TASKS), default=list(models.TASKS), help="heads to try"
    )
    parser.add_argument("--only", nargs="+", metavar="MODEL_TYPE", help="architectures to try; all of them by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--seconds", type=int, default=120, help="how long one model may take (default: 120)")
    arguments = parser.parse_args()
    cases = [Case(task, arch) for task in arguments.tasks for arch in arguments.only or models.names(task)]
    counts: Counter[str] = Counter()
    console = Console(soft_wrap=True)
    with Progress(console=console) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        bar = progress.add_task("surveying", total=len(cases))
        for case, rows in zip(cases, pool.map(lambda case: examine_apart(case, arguments.seconds), cases), strict=True):
            progress.advance(bar)
            for kind, said in rows.items():
                verdict = said.split(":")[0] if said.startswith(("refused", "not run")) else "wrong"
                verdict = "right" if said.endswith(": right") else verdict
                counts[f"{kind}: {verdict}"] += 1
                if verdict != "right":
                    console.print(f"{case} | {kind} | {said}", markup=False, highlight=False)
    for name, count in sorted(counts.items()):
        console.print(f"{count:5d}  {name}", highlight=False)
    return 1 if any(name.endswith("wrong") for name in counts) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Fuzz the readers of files with atheris, one after the other: `python -m tests.fuzz --seconds 600 peft layout`.

atheris (libFuzzer for Python) keeps each input that reaches new code, and builds further inputs from it. It needs Linux.
Each reader runs in a process of its own, which fails on an unexpected exception, on an input that takes longer than 20 seconds,
and above 3 GiB of memory. Inputs that reach new code are kept in `build/fuzz/`; a failing input is moved to
`tests/fuzz/corpus/`, which the tests replay, so that it becomes a regression test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fuzz.corpus_files import CORPUS, readers

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "fuzz"
_LIMITS = ("-rss_limit_mb=3072", "-timeout=20", "-max_len=20000", "-print_final_stats=1", "-reload=0")


def main() -> int:
    """Fuzz the readers named on the command line, or all. -> the exit status: 1 if a reader failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"one of {', '.join(readers())}; all by default")
    parser.add_argument("--seconds", type=int, default=600, help="how long to fuzz in all (default: 600)")
    parser.add_argument(
        "--minimize", action="store_true", help="afterwards, keep the smallest inputs in tests/fuzz/corpus/"
    )
    chosen = parser.parse_args()
    for unknown in set(chosen.readers) - set(readers()):
        parser.error(f"there is no reader {unknown!r}; there are {', '.join(readers())}")
    names = chosen.readers or readers()
    failed = [name for name in names if not fuzz(name, max(1, chosen.seconds // len(names)))]
    if chosen.minimize:
        for name in names:
            minimize(name)
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz one reader. -> whether it passed; if not, a failing input is in the corpus."""
    work, seeds, found = BUILD / name, CORPUS / name, BUILD / f"{name}-findings"
    for folder in (work, seeds, found):
        folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {seconds} s", flush=True)
    status, said = _run(name, work, seeds, *_LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={found}/")
    print("\n".join(line for line in said.splitlines() if line.startswith("stat::number_of_executed")), flush=True)
    for artifact in sorted(found.iterdir()):
        kept = seeds / f"found-{artifact.name}"
        shutil.move(artifact, kept)
        print(f"{name}: FAILED; the input is {kept.relative_to(ROOT)}")
    if status:
        start = max(said.find("Traceback"), said.find("Uncaught"), 0)
        print(said[start : start + 4000] if start else said[-4000:])
    return status == 0


def minimize(name: str) -> None:
    """Move the smallest set of inputs that reaches the same code to the corpus; findings stay."""
    work, seeds, merged = BUILD / name, CORPUS / name, BUILD / f"{name}-merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    status, said = _run(name, merged, seeds, work, "-merge=1", *_LIMITS[:3])
    if status:
        raise SystemExit(said[-4000:])
    for file in seeds.iterdir():
        if not file.name.startswith(("found-", "seed-")):
            file.unlink()
    for file in merged.iterdir():
        if not any(other.read_bytes() == file.read_bytes() for other in seeds.iterdir()):
            shutil.move(file, seeds / file.name[:12])


def _run(name: str, *arguments: object) -> tuple[int, str]:
    """Run libFuzzer on a reader in a new process. -> its exit status, and what it printed."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests" / "support")}
    command = [sys.executable, "-m", "tests.fuzz.one", name, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())

"""Install a built wheel with one extra into a fresh environment, and run that integration's example there.

    python tests/support/extras.py                 # every extra that names an integration; needs PyPI and some minutes each
    python tests/support/extras.py trl lightning

An extra whose framework `make test` does without has its tests run there too. Nothing of the repository is on the path but
`tests/`, which holds what an example finds ready. The wheel must hold the modules that this checkout holds, and the
environment only what the extra asks for.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "integrations").glob("*.py") if not path.stem.startswith("_"))


def extras() -> dict[str, bool]:
    """The extras named like a module of integrations, and whether that module's tests need them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    together = re.findall(r"[\w-]+", " ".join(declared["integrations"]))
    names = [name for name in declared if name.replace("-", "_") in MODULES]
    return {name: bool(declared[name]) and name not in together for name in names}


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command; show its output if it fails."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    told = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if told.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {told.returncode}:\n{told.stdout[-6000:]}")


def wheel_into(folder: Path) -> Path:
    """Build the wheel from what git tracks, so that no build directory is left in the tree."""
    source = folder / "source"
    run("git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    run(*build, "--wheel-dir", folder, source)
    [wheel] = folder.glob("softhooks-*.whl")
    return wheel


def check(extra: str, wheel: Path, folder: Path, torch: list[str]) -> None:
    """One extra in one fresh environment."""
    python = folder / extra / "bin" / "python"
    run(sys.executable, "-m", "venv", folder / extra)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    run(*pip, "-c", ROOT / "constraints.txt", *torch, "torch")
    module, is_apart = extra.replace("-", "_"), extras()[extra]
    run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[{extra}{',test' if is_apart else ''}]")
    listing = (
        "import pkgutil, softhooks.integrations as i; print(*sorted(m.name for m in pkgutil.iter_modules(i.__path__)))"
    )
    told = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True, cwd=folder)
    if told.stdout.split() != MODULES:
        raise SystemExit(f"the wheel holds the integrations {told.stdout.split()}, this checkout {MODULES}")
    example = ROOT / "tests" / "support" / "examples.py"
    run(python, example, module, cwd=folder, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if is_apart:
        tests = ROOT / "tests" / "integrations" / f"test_{module}.py"
        run(python, "-m", "pytest", "-q", tests, cwd=folder, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def main() -> None:
    """Check each extra, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="which extras; all of them if none is named")
    parser.add_argument("--torch", default="", help="pip's arguments for torch alone, such as an index of CPU builds")
    chosen = parser.parse_args()
    for unknown in set(chosen.extras) - set(extras()):
        raise SystemExit(f"there is no extra {unknown!r} that names an integration; there are {', '.join(extras())}")
    for extra in chosen.extras or extras():
        # One environment at a time: each takes more than a gigabyte.
        with tempfile.TemporaryDirectory() as name:
            start = time.monotonic()
            folder = Path(name)
            check(extra, wheel_into(folder), folder, chosen.torch.split())
            print(
                f"{extra:<24} installed from the wheel; its example ran  ({time.monotonic() - start:.0f} s)", flush=True
            )


if __name__ == "__main__":
    main()

"""Write `locks/`: the pinned packages with the hashes of their files, which `make` installs; `make lock` runs this.

The versions come from constraints.txt. Each lock contains only what the locks before it do not contain. torch is in none of them:
its builds for CPU and CUDA are different files under the same version, and which one is installed depends on the machine.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
_HEADER = "# Written by `make lock` from pyproject.toml and constraints.txt; do not edit.\n"
_OF_TORCH = ["filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"]
"""What torch depends on, except for its builds' own libraries."""


_PYTHON = "3.11.5"  # the oldest version that all pinned packages support
_TOOLS = ["build", "cyclonedx-bom", "pip-audit", "setuptools", "twine", "uv", "wheel"]
"""The tools that make a release. They have an environment of their own, and so their own versions."""


def compile_lock(
    name: str, requirements: list[str], extras: list[str], present: set[str], pins: Path | None
) -> set[str]:
    """Write one lock with uv. -> the names of its packages, without those that only some systems install."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", f"--python-version={_PYTHON}"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--no-emit-package=softhooks"]
    command += [f"--no-emit-package={package}" for package in sorted(present)]
    listed, excluded = LOCKS / f"{name}.in", LOCKS / "excluded.in"
    listed.write_text("\n".join(requirements) + "\n")
    excluded.write_text("torch\n")
    command += [str(listed), f"--excludes={excluded}"]
    if extras:
        command += [str(ROOT / "pyproject.toml"), *(f"--extra={extra}" for extra in extras)]
    if pins is not None:
        command += ["--constraints", str(pins)]
    try:
        locked = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{name}: {error.stderr}") from error
    finally:
        listed.unlink()
        excluded.unlink()
    text = locked.partition("\n# The following packages were excluded")[0].rstrip() + "\n"
    (LOCKS / f"{name}.txt").write_text(_HEADER + text)
    return set(re.findall(r"^([A-Za-z0-9_.-]+)==[^ ;]+ \\$", text, re.MULTILINE))


def main() -> None:
    """Write all locks."""
    LOCKS.mkdir(exist_ok=True)
    pins = ROOT / "constraints.txt"
    present = compile_lock("build", ["setuptools"], [], set(), pins)
    present |= compile_lock("test", _OF_TORCH, ["quality", "test"], present, pins)
    present |= compile_lock("integrations", [], ["docs", "integrations"], present, pins)
    compile_lock("fuzz", [], ["fuzz"], present, pins)
    compile_lock("release", _TOOLS, [], set(), None)


if __name__ == "__main__":
    main()

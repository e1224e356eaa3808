"""Every module of integrations shows an example of at most fifteen lines, and it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import examples
import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "integrations").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_short_and_stands_for_itself(name: str) -> None:
    lines = [line for line in examples.source_of(name).splitlines() if line.strip()]
    assert 1 <= len(lines) <= examples.LONGEST
    assert (examples.HERE / "given" / f"{name}.py").is_file()


def test_no_framework_is_imported_before_it_is_used() -> None:
    """In a fresh interpreter, importing softhooks and every integration loads none of the frameworks."""
    modules = ", ".join(f"softhooks.integrations.{name}" for name in NAMES)
    frameworks = [
        "trl", "lightning", "pytorch_lightning", "sentence_transformers", "setfit", "lm_eval", "ignite", "skorch", "optuna",
        "tensorboard", "wandb", "mlflow", "composer", "ray", "axolotl", "llamafactory", "peft", "vllm", "sglang", "datasets",
    ]  # fmt: skip
    own = "import sys, transformers.trainer\nbefore = set(sys.modules)"  # transformers loads what it finds of them by itself
    code = f"{own}\nimport softhooks, {modules}\nprint([n for n in {frameworks!r} if n in sys.modules and n not in before])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.strip() == "[]"

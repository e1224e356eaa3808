"""The Python blocks of docs/frameworks.md run, with the names prepared for the example of the module that they import."""

from __future__ import annotations

import re
from pathlib import Path

import examples
import markdown
import pytest
import torch
import transformers as tf
from markdown import Block
from untouched import remove_all

import softhooks

BLOCKS = markdown.blocks("docs/frameworks.md", "python")
PACKAGES = {
    "trl": "trl",
    "accelerate": "accelerate",
    "sentence_transformers": "sentence_transformers",
    "optuna": "optuna",
}


def _framework(block: Block) -> str:
    (name,) = re.findall(r"from softhooks\.integrations\.(\w+) import", block.code)
    return str(name)


def test_every_package_has_a_block() -> None:
    assert sorted(map(_framework, BLOCKS)) == sorted(PACKAGES)


@pytest.mark.parametrize("block", BLOCKS, ids=_framework)
def test_the_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framework = _framework(block)
    pytest.importorskip(PACKAGES[framework])
    monkeypatch.chdir(tmp_path)
    names = {"softhooks": softhooks, "torch": torch, "Trainer": tf.Trainer, **examples.given(framework)}
    exec(compile(block.code, str(block), "exec"), names)
    remove_all()

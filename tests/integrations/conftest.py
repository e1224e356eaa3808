"""Prompts of the tiny Llama, exported for vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.integrations import vllm
from softhooks.integrations._vllm_settings import _folder


@pytest.fixture(scope="session")
def exported_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the prompts `en` and `de`, which no test changes."""
    folder: Path = tmp_path_factory.mktemp("prompts")
    model = zoo.build("llama")
    for name, method in {"en": PrefixTuning(6), "de": PromptTuning(3)}.items():
        with softhooks.attach(model, method, name=name):
            vllm.export(model, folder, name)
    return folder


@pytest.fixture
def prompt_folder(exported_prompts: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the directory."""
    for file in exported_prompts.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _folder.cache_clear()
    yield tmp_path
    _folder.cache_clear()

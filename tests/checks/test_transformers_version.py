"""Versions of transformers that softhooks does not support are excluded by its requirements, and refused by `attach`."""

from __future__ import annotations

import tomllib

import pytest
import transformers
import zoo
from markdown import ROOT
from packaging.requirements import Requirement

import softhooks
from softhooks import AttachError, PromptTuning
from softhooks.checks.transformers_version import FIRST_UNSUPPORTED


@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "5.24.1", "6.0.0"])
def test_an_unsupported_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(AttachError, match=rf"transformers {version}(.|\n)*pip install \"transformers<5.24\""):
        softhooks.attach(model, PromptTuning(3))
    assert "soft_prompt" not in dict(model.named_children())


def test_the_last_supported_version_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.23.9")
    softhooks.attach(zoo.build("llama"), PromptTuning(3))


def test_the_requirements_and_the_readme_name_the_same_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [needed] = [one for one in map(Requirement, project["dependencies"]) if one.name == "transformers"]
    assert str(needed.specifier) == f"<{FIRST_UNSUPPORTED},>=5.16"
    assert "transformers 5.16 to 5.23" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

"""`softhooks export` without a text: the files, names and options of prompts that vLLM serves as keys and values."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import zoo
from typer.testing import CliRunner

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptStore, PromptTuning
from softhooks.cli import app
from softhooks.errors import UnsupportedMethodError
from softhooks.serving.prompt_folder import PromptFolder

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    model = zoo.build("llama")
    model.save_pretrained(folder / "model")
    for name, method in {"en": PrefixTuning(5), "de": PromptTuning(3), "adapter": LlamaAdapter(3)}.items():
        with softhooks.attach(model, method) as prompt:
            prompt.save_pretrained(folder / name)
    return folder


def run(saved: Path, output: Path, *prompts: str) -> Any:
    folders = [str(saved / name) for name in prompts]
    return runner.invoke(
        app.app, ["export", *folders, "--to", "vllm", "--model", str(saved / "model"), "--output", str(output)]
    )


def test_export_writes_a_file_for_each_prompt_and_names_the_option(saved: Path, tmp_path: Path) -> None:
    done = run(saved, tmp_path / "served", "en", "de")
    assert done.exit_code == 0, done.output
    assert PromptFolder(tmp_path / "served").names() == ["de", "en"]
    assert "en.safetensors: prefix_tuning, 5 virtual tokens, 2 layers" in done.output
    option, value = shlex.split(done.stdout.splitlines()[-1])
    assert option == "--kv-transfer-config"
    assert json.loads(value)["kv_connector_extra_config"] == {"prompts": str(tmp_path / "served")}


def test_export_for_sglang_names_the_command(saved: Path, tmp_path: Path) -> None:
    model, served = saved / "model", tmp_path / "served prompts"
    command = ["export", str(saved / "en"), "--to", "sglang", "--model", str(model), "--output", str(served)]
    done = runner.invoke(app.app, command)
    assert done.exit_code == 0, done.output
    assert PromptFolder(served).names() == ["en"]
    folder, *start = shlex.split(done.stdout.splitlines()[-1])
    assert folder == f"SOFTHOOKS_PROMPTS={served}"
    assert start == shlex.split(f"python -m sglang.launch_server --model-path {model} --radix-cache-backend softhooks")


def test_export_refuses_prompts_of_the_same_name_and_what_is_no_prefix(saved: Path, tmp_path: Path) -> None:
    assert "two prompts would get the name 'en'" in str(run(saved, tmp_path, "en", "en").exception)
    assert isinstance(run(saved, tmp_path, "adapter").exception, UnsupportedMethodError)
    assert PromptFolder(tmp_path).names() == []


def test_export_of_a_store(saved: Path, tmp_path: Path) -> None:
    store, served = PromptStore(tmp_path / "store"), tmp_path / "served"
    command = ["export", "--to", "vllm", "--model", str(saved / "model"), "--output", str(served)]
    for name in ("en", "de"):
        store.add(saved / name, name)
    store.tag("de", "production")
    refused = runner.invoke(app.app, [*command, "--store", str(store.folder), "--tag", "new"])
    assert "contains no prompt with the tag 'new'" in str(refused.exception)
    done = runner.invoke(app.app, [*command, "--store", str(store.folder), "--tag", "production"])
    assert done.exit_code == 0, done.output
    assert PromptFolder(served).names() == ["de"]
    done = runner.invoke(app.app, [*command, "--store", str(store.folder)])
    assert done.exit_code == 0, done.output
    assert PromptFolder(served).names() == ["de", "en"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no prompt to export"),
        (("--tag", "production"), "--tag selects prompts of a store"),
        (("--store", "{empty}"), "contains no prompt"),
    ],
    ids=["nothing", "tag", "empty store"],
)
def test_export_of_nothing(options: tuple[str, ...], message: str, saved: Path, tmp_path: Path) -> None:
    command = ["export", "--to", "vllm", "--model", str(saved / "model"), "--output", str(tmp_path / "served")]
    done = runner.invoke(app.app, [*command, *(option.format(empty=tmp_path) for option in options)])
    assert message in str(done.exception)


@pytest.mark.parametrize(
    "options", [("--chat",), ("--max-tokens", "128"), ("--temperature", "0.5"), ("--served-name", "x")], ids=str
)
def test_options_that_only_change_a_request_are_refused_without_a_text(options: tuple[str, ...]) -> None:
    """Also with their default values, because no file depends on them."""
    done = runner.invoke(app.app, ["export", "en", "--to", "vllm", "--model", "m", "--output", "out", *options])
    assert str(done.exception).startswith(f"{options[0]} cannot be used without a text")


def test_a_request_with_a_text_has_one_prompt(saved: Path, tmp_path: Path) -> None:
    command = ["export", str(saved / "en"), str(saved / "de"), "--to", "vllm", "--model", str(saved / "model")]
    done = runner.invoke(app.app, [*command, "--output", str(tmp_path), "--text", "word5"])
    assert "2 prompts are given with --text" in str(done.exception)

"""`softhooks store`: the commands do what `PromptStore` does, and say what they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo
from hub_stand_in import HubStandIn
from typer.testing import CliRunner

import softhooks
from softhooks import PromptStore, PromptTuning
from softhooks.cli import app
from softhooks.cli.exit_codes import report_errors
from softhooks.cli.prompt_names import default_name
from softhooks.formats.softhooks_files import TENSORS

runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path / "sst2")
    return tmp_path / "sst2"


def run(*arguments: str | Path, code: int = 0) -> str:
    """Run a command of `softhooks store`, and return what it prints."""
    status = 0
    try:
        with report_errors():
            result = runner.invoke(app.app, ["store", *map(str, arguments)])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
        status = result.exit_code
    except SystemExit as left:
        status = int(str(left.code))
    assert status == code
    return result.output


def test_prompts_are_added_tagged_listed_and_removed(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert run("add", folder, saved).strip() == f"sst2 -> {folder / 'sst2'}"
    run("add", folder, saved, "--name", "second", "--tag", "old", "--tag", "candidate")
    assert run("tag", folder, "sst2", "production", "v2").strip() == "sst2: production, v2"
    assert run("untag", folder, "sst2", "v2").strip() == "sst2: production"
    header, *lines = run("list", folder).splitlines()
    assert header.split() == ["name", "method", "virtual", "tokens", "tags", "base"]
    assert [line.split() for line in lines] == [
        ["second", "prompt_tuning", "4", "candidate,", "old", "LlamaForCausalLM"],
        ["sst2", "prompt_tuning", "4", "production", "LlamaForCausalLM"],
    ]
    [one] = json.loads(run("list", folder, "--tag", "production", "--json"))
    assert one == {
        "name": "sst2", "damaged": None, "tags": ["production"], "method": "prompt_tuning", "num_virtual_tokens": 4,
        "base": None, "base_class": "LlamaForCausalLM",
    }  # fmt: skip
    assert run("remove", folder, "sst2").strip() == f"sst2 removed from {folder}"
    assert PromptStore(folder).names() == ["second"]


def test_the_default_name_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "sst2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    assert [default_name(source) for source in ("sst2", "sst2/", "sst2/.", str(tmp_path / "runs" / "sst2"))] == [
        "sst2"
    ] * 4
    assert default_name(".") == "runs"
    assert [default_name(name) for name in ("me/other", "me/other/")] == ["other"] * 2  # on the Hub


def test_replace_replaces_the_prompt_and_its_tags(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    run("add", folder, saved, "--tag", "old")
    (folder / "sst2" / TENSORS).write_bytes(b"damaged")
    run("add", folder, saved, "--tag", "new", "--replace")
    store = PromptStore(folder)
    assert store.tags("sst2") == ["new"]
    assert store.load(zoo.build("llama"), "sst2").is_attached


def test_a_damaged_prompt_is_listed_as_damaged(saved: Path, tmp_path: Path) -> None:
    run("add", tmp_path / "store", saved)
    (tmp_path / "store" / "sst2" / TENSORS).write_bytes(b"damaged")
    result = runner.invoke(app.app, ["store", "list", str(tmp_path / "store")])
    assert result.exit_code == 1
    assert "damaged" in result.stdout


def test_wrong_names_and_folders_end_with_status_2(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    run("list", folder, code=2)
    assert "there is no store at" in capsys.readouterr().err
    run("add", folder, saved)
    run("add", folder, saved, code=2)
    assert "--replace" in capsys.readouterr().err
    run("tag", folder, "../sst2", "x", code=2)
    run("remove", folder, "other", code=2)
    assert PromptStore(folder).names() == ["sst2"]


def test_the_prompts_of_a_collection_are_added(hub: HubStandIn, saved: Path, tmp_path: Path) -> None:
    folder, slug = tmp_path / "store", "me/prompts-64f9a55bb3115b4f513ec026"
    hub.add("me/sst2", saved)
    hub.collections[slug] = [("model", "me/sst2")]
    run("add", folder, slug, "--collection", "--name", "x", code=2)
    assert run("add", folder, slug, "--collection", "--tag", "hub").strip() == f"sst2 -> {folder / 'sst2'}"
    assert PromptStore(folder).tags("sst2") == ["hub"]

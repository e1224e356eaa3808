"""Prompts from the Hub: the commit that was loaded, lost connections, and sizes that are wrong or too large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_api
import pytest
import torch
import zoo
from hub_api import TOKEN, USER, Fault
from hub_stand_in import HubStandIn
from huggingface_hub import constants
from untouched import remove_all, same_bits, untouched

import softhooks
from softhooks import CheckpointError, PromptTuning
from softhooks.formats import peft_read
from softhooks.formats.download import MAX_BYTES
from softhooks.formats.softhooks_files import DESCRIPTION, FORMAT, TENSORS
from softhooks.model_card.card import FILE

REPO = f"{USER}/prompt"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), 1)


def save(folder: Path, seed: int, **options: Any) -> Path:
    """Save a new prompt."""
    torch.manual_seed(seed)
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        prompt.save_pretrained(folder, **options)
    return folder


def rows(folder: Path) -> torch.Tensor:
    with softhooks.load(zoo.build("llama"), folder) as prompt:
        return prompt.embeddings()


def cached(tmp_path: Path) -> list[Path]:
    """The contents of files in the cache, complete or not."""
    return list((tmp_path / "hub-cache").rglob("blobs/*"))


# --- the commit -------------------------------------------------------------------------------------------------------


def test_only_the_prompts_own_file_is_requested(hub: HubStandIn, saved: Path) -> None:
    commit = hub.add(REPO, saved)
    prompt = softhooks.load(zoo.build("llama"), REPO)
    assert same_bits(prompt.embeddings(), rows(saved))
    assert prompt.loaded_from is not None
    assert (prompt.loaded_from.repo_id, prompt.loaded_from.commit_hash) == (REPO, commit)
    assert {path for _, path in hub.requests if REPO in path} == {f"/{REPO}/resolve/main/{TENSORS}"}


@pytest.mark.parametrize("revision", ["v1", "commit", None])
def test_a_revision_is_resolved_to_its_commit(hub: HubStandIn, saved: Path, tmp_path: Path, revision: Any) -> None:
    first = hub.add(REPO, saved)
    repository = hub.repositories[REPO]
    repository.refs["v1"] = first
    second = hub.add(REPO, save(tmp_path / "second", 2))
    prompt = softhooks.load(zoo.build("llama"), REPO, revision=first if revision == "commit" else revision)
    expected, folder = (second, tmp_path / "second") if revision is None else (first, saved)
    assert prompt.loaded_from is not None
    assert prompt.loaded_from.commit_hash == expected
    assert same_bits(prompt.embeddings(), rows(folder))


def test_the_commit_is_saved_with_a_prompt_that_was_loaded(hub: HubStandIn, saved: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, saved)
    model = zoo.build("llama")
    with softhooks.load(model, REPO, trainable=True) as prompt:
        prompt.save_pretrained(tmp_path / "again")
    description = json.loads((tmp_path / "again" / DESCRIPTION).read_text())
    assert description["loaded_from"] == {"repo_id": REPO, "commit_hash": commit}
    assert "loaded_from" not in json.loads((saved / DESCRIPTION).read_text())
    again = softhooks.load(model, tmp_path / "again")
    assert again.loaded_from is not None
    assert again.loaded_from.commit_hash == commit


@pytest.mark.parametrize(
    "value",
    [
        "main",
        {},
        {"repo_id": REPO},
        {"repo_id": "../../x", "commit_hash": "a" * 40},
        {"repo_id": REPO, "commit_hash": "main"},
    ],
)
def test_a_malformed_commit_in_a_file_is_refused(value: Any, saved: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(saved / TENSORS, framework="pt") as file:
        description = json.loads(file.metadata()[FORMAT])
    save_file(
        load_file(saved / TENSORS), tmp_path / TENSORS, {FORMAT: json.dumps({**description, "loaded_from": value})}
    )
    with pytest.raises(CheckpointError, match="loaded_from"):
        softhooks.load(zoo.build("llama"), tmp_path)


def test_a_prompt_in_peft_s_format(hub: HubStandIn, tmp_path: Path, saved: Path) -> None:
    commit = hub.add(REPO, save(tmp_path / "peft", 1, as_peft=True))
    prompt = softhooks.load(zoo.build("llama"), REPO)
    assert same_bits(prompt.embeddings(), rows(saved))
    assert prompt.loaded_from is not None
    assert prompt.loaded_from.commit_hash == commit
    assert (hub.asked("GET", peft_read.CONFIG), hub.asked("GET", peft_read.TENSORS)) == (1, 1)


# --- no prompt, no access ---------------------------------------------------------------------------------------------


def refused(path: str, match: str, **options: Any) -> str:
    """Return the message of the error for a prompt that cannot be loaded; the model must not have changed."""
    model = zoo.build("llama")
    with untouched(model), pytest.raises(CheckpointError, match=match) as caught:
        softhooks.load(model, path, **options)
    return str(caught.value)


def test_a_repository_or_a_revision_that_does_not_exist(hub: HubStandIn, saved: Path) -> None:
    refused("me/nothing", "neither a local directory nor a repository")
    hub.add(REPO, saved)
    assert "revision v9" in refused(REPO, "cannot be downloaded", revision="v9")


def test_a_repository_without_a_prompt(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_model.bin").write_bytes(b"a pickle")
    hub.add(REPO, tmp_path / "other")
    refused(REPO, "does not contain a saved prompt")
    assert not hub.asked("GET", "adapter_model.bin")
    (tmp_path / "other" / peft_read.CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
    hub.add(REPO, tmp_path / "other")
    refused(REPO, "pickles .* are not loaded")


def test_a_private_repository_needs_the_token(hub: HubStandIn, saved: Path) -> None:
    hub.add(REPO, saved, private=True)
    refused(REPO, "a private repository needs a token")
    softhooks.load(zoo.build("llama"), REPO, token=TOKEN)


def test_without_a_connection_the_cache_is_used(
    hub: HubStandIn, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(REPO, saved)
    softhooks.load(zoo.build("llama"), REPO).remove()
    hub.add("me/peft", save(tmp_path / "peft", 1, as_peft=True))
    softhooks.load(zoo.build("llama"), "me/peft").remove()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    prompt = softhooks.load(zoo.build("llama"), REPO)
    assert prompt.loaded_from is not None
    assert prompt.loaded_from.commit_hash == commit
    softhooks.load(zoo.build("llama"), "me/peft")
    assert "HF_HUB_OFFLINE" in refused("me/other", "neither a local directory nor a repository")
    assert len(hub.requests) == before


# --- a bad connection -------------------------------------------------------------------------------------------------


def test_an_interrupted_download_is_continued(hub: HubStandIn, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)
    hub.add(REPO, saved)
    hub.faults[TENSORS] = [hub_api.cut_off(100)]
    prompt = softhooks.load(zoo.build("llama"), REPO)
    assert same_bits(prompt.embeddings(), rows(saved))
    assert hub.ranges == ["bytes=100-"]


@pytest.mark.parametrize(
    "fault", [hub_api.cut_off(0), hub_api.status(500), hub_api.shorter], ids=["cut off", "status 500", "shorter"]
)
def test_a_download_that_never_ends_well_leaves_nothing_behind(
    hub: HubStandIn, saved: Path, tmp_path: Path, fault: Fault
) -> None:
    hub.add(REPO, saved)
    hub.faults[TENSORS] = [fault] * 10
    refused(REPO, "cannot be downloaded from the Hub")
    assert not cached(tmp_path)
    hub.faults.clear()
    softhooks.load(zoo.build("llama"), REPO)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_an_overloaded_server_is_asked_again(hub: HubStandIn, saved: Path, code: int) -> None:
    hub.add(REPO, saved)
    hub.head_faults[TENSORS] = [hub_api.status(code)] * 2
    softhooks.load(zoo.build("llama"), REPO)
    assert hub.asked("HEAD", TENSORS) == 4  # two faults, the size, and the download


def test_a_server_that_is_down(hub: HubStandIn, saved: Path) -> None:
    hub.add(REPO, saved)
    hub.head_faults[TENSORS] = [hub_api.status(503)] * 100
    assert "503" in refused(REPO, "neither a local directory nor a repository that can be downloaded")


def test_an_answer_that_takes_too_long_is_requested_again(
    hub: HubStandIn, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, saved)
    hub.faults[TENSORS] = [hub_api.held_back]  # sends nothing before the end of the test
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.01)
    hub.when_slept = lambda: monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600)
    prompt = softhooks.load(zoo.build("llama"), REPO)
    assert same_bits(prompt.embeddings(), rows(saved))
    assert hub.asked("GET", TENSORS) == 2


def test_a_download_that_always_takes_too_long(
    hub: HubStandIn, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, saved)
    hub.faults[TENSORS] = [hub_api.held_back] * 20
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.01)
    assert "Timeout" in refused(REPO, "cannot be downloaded from the Hub")
    assert not cached(tmp_path)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MAX_BYTES[".safetensors"] + 1, 10**15])
def test_a_file_that_is_too_large_is_not_downloaded(hub: HubStandIn, saved: Path, size: int) -> None:
    hub.add(REPO, saved)
    hub.head_faults[TENSORS] = [hub_api.announced(size)]
    assert f"{size:,} bytes" in refused(REPO, "too large for a saved prompt")
    assert not hub.asked("GET", TENSORS)


def test_a_config_that_is_too_large_is_not_downloaded(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add(REPO, save(tmp_path / "peft", 1, as_peft=True))
    hub.head_faults[peft_read.CONFIG] = [hub_api.announced(MAX_BYTES[".json"] + 1)]
    refused(REPO, "too large for a saved prompt")
    hub.head_faults[peft_read.TENSORS] = [hub_api.announced(MAX_BYTES[".safetensors"] + 1)]
    refused(REPO, "too large for a saved prompt")
    assert not hub.asked("GET", peft_read.TENSORS)


@pytest.mark.parametrize("fault", [hub_api.longer, hub_api.endless])
def test_a_file_that_is_larger_than_announced_is_not_kept(
    hub: HubStandIn, saved: Path, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.add(REPO, saved)
    hub.faults[TENSORS] = [fault]
    size = (saved / TENSORS).stat().st_size
    message = refused(REPO, "more bytes than it announced")
    assert f"{size:,} bytes" in message
    assert hub.asked("GET", TENSORS) == 1
    assert not cached(tmp_path)


def test_a_card_is_never_downloaded_with_a_prompt(hub: HubStandIn, saved: Path) -> None:
    hub.add(REPO, saved)
    hub.repositories[REPO].commit({FILE: b"# a card", "model.safetensors": b"weights"})
    softhooks.load(zoo.build("llama"), REPO)
    assert not hub.asked("GET", FILE) + hub.asked("GET", "model.safetensors")

"""Prompts that come into a store from the Hub: repositories, their revisions, and collections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import untouched
import zoo
from hub_stand_in import HubStandIn

import softhooks
from softhooks import PromptStore, PromptTuning
from softhooks.errors import CheckpointError, NameTakenError, PromptMismatchError

IDS = torch.arange(5, 13)[None]
SLUG = "me/prompts-64f9a55bb3115b4f513ec026"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    untouched.remove_all()


def test_a_revision_of_a_repository_is_added(hub: HubStandIn, tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    first = hub.add("me/prompt", tmp_path / "en")
    hub.add("me/prompt", tmp_path / "de")
    store, model = PromptStore(tmp_path / "store"), zoo.build("llama")
    store.add("me/prompt", "old", revision=first)
    store.add("me/prompt", "new")
    for name, key in (("old", "en"), ("new", "de")):
        with store.load(model, name):
            torch.testing.assert_close(model(IDS).logits, saved[key])


def test_a_collection_is_added_with_the_names_of_its_repositories(
    hub: HubStandIn, tmp_path: Path, saved: dict[str, torch.Tensor]
) -> None:
    commits = [hub.add("me/en.v1", tmp_path / "en"), hub.add("you/de", tmp_path / "de")]
    hub.collections[SLUG] = [("model", "me/en.v1"), ("dataset", "me/rows"), ("model", "you/de")]
    store, model = PromptStore(tmp_path / "store"), zoo.build("llama")
    assert store.add_collection(SLUG, tags=["hub"]) == ["en-v1", "de"]
    assert store.names(tag="hub") == ["de", "en-v1"]
    for name, logits, commit in zip(["en-v1", "de"], saved.values(), commits, strict=True):
        with store.load(model, name) as prompt:
            torch.testing.assert_close(model(IDS).logits, logits)
            assert prompt.loaded_from is not None
            assert prompt.loaded_from.commit_hash == commit
    with pytest.raises(NameTakenError):
        store.add_collection(SLUG)
    assert store.add_collection(SLUG, replace=True) == ["en-v1", "de"]
    assert store.names(tag="hub") == []


def test_a_collection_is_added_as_a_whole_or_not_at_all(
    hub: HubStandIn, tmp_path: Path, saved: dict[str, torch.Tensor]
) -> None:
    hub.add("me/en", tmp_path / "en")
    hub.add("me/other", _other(tmp_path / "other"))
    hub.add("me/weights", _without_prompt(tmp_path / "weights"))
    store = PromptStore(tmp_path / "store")
    for items, error in [
        ([("model", "me/en"), ("model", "me/other")], PromptMismatchError),
        ([("model", "me/en"), ("model", "me/weights")], CheckpointError),
        ([("model", "me/en"), ("model", "me/missing")], CheckpointError),
        ([("model", "me/en"), ("model", "you/en")], NameTakenError),
        ([("model", "me/keys")], NameTakenError),
        ([("dataset", "me/rows")], CheckpointError),
    ]:
        hub.collections[SLUG] = items
        with pytest.raises(error):
            store.add_collection(SLUG)
        assert store.names() == []
    with pytest.raises(CheckpointError, match="the collection 'me/none' cannot be read"):
        store.add_collection("me/none")


def _other(folder: Path) -> Path:
    with softhooks.attach(zoo.build("llama", seed=9), PromptTuning(2)) as prompt:
        prompt.save_pretrained(folder)
    return folder


def _without_prompt(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder

"""A store of prompts: what is added is loaded by name, and nothing else is reached or changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import untouched
import zoo

import softhooks
from softhooks import PromptStore, PromptTuning
from softhooks.errors import CheckpointError, NameTakenError, NotAttachedError, OptionError, PromptMismatchError
from softhooks.formats import softhooks_files
from softhooks.formats.files import read_tensors
from softhooks.formats.find import read
from softhooks.formats.softhooks_files import DESCRIPTION, TENSORS
from softhooks.serving.tags import FILE as TAGS

IDS = torch.arange(5, 13)[None]
BAD_NAMES = ["", ".", "..", "a/b", "../en", "/etc", "a.b", "keys", "a" * 129, "en\n", "a b", "C:x", "a\\b"]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    untouched.remove_all()


def test_prompts_are_loaded_by_name(store: PromptStore, saved: dict[str, torch.Tensor]) -> None:
    assert store.names() == list(store) == ["de", "en"]
    assert len(store) == 2
    model = zoo.build("llama")
    for name, logits in saved.items():
        prompt = store.load(model, name)
        assert prompt.name == name
        torch.testing.assert_close(model(IDS).logits, logits)
    with pytest.raises(NameTakenError):
        store.load(model, "en")


def test_tags_select_prompts(store: PromptStore) -> None:
    assert store.tags("en") == ["production", "v2"]
    assert store.tags("de") == []
    store.tag("de", "v2", "a.b-c_d")
    store.untag("en", "v2", "other")
    assert store.tags("de") == ["a.b-c_d", "v2"]
    assert store.names(tag="v2") == ["de"]
    assert store.names(tag="production") == ["en"]
    assert store.names(tag="other") == []
    store.untag("en", "production")
    assert not (store.folder / "en" / TAGS).exists()


def test_tags_are_added_to_those_that_are_there(store: PromptStore) -> None:
    store.tag("en", "new")
    assert store.tags("en") == ["new", "production", "v2"]
    with pytest.raises(OptionError, match="at most 64"):
        store.tag("en", *(f"t{number}" for number in range(62)))
    assert store.tags("en") == ["new", "production", "v2"]


def test_an_attached_prompt_and_one_that_is_saved_into_the_folder(tmp_path: Path) -> None:
    store, model = PromptStore(tmp_path / "store"), zoo.build("llama")
    with softhooks.attach(model, PromptTuning(2)) as prompt:
        store.add(prompt, "live", tags=["new"])
        prompt.save_pretrained(store.folder / "by_hand")
        logits = model(IDS).logits
    assert store.names() == ["by_hand", "live"]
    store.tag("by_hand", "new")
    assert store.names(tag="new") == ["by_hand", "live"]
    for name in store:
        with store.load(model, name):
            torch.testing.assert_close(model(IDS).logits, logits)


def test_a_prompt_is_replaced_only_on_request(store: PromptStore, tmp_path: Path, saved: dict[str, Any]) -> None:
    before = (store.folder / "en" / TENSORS).read_bytes()
    for name in ("en", "EN"):
        with pytest.raises(NameTakenError, match="already has a prompt named 'en'"):
            store.add(tmp_path / "de", name)
    assert (store.folder / "en" / TENSORS).read_bytes() == before
    store.add(tmp_path / "de", "en", replace=True)
    assert store.tags("en") == []
    model = zoo.build("llama")
    store.load(model, "en")
    torch.testing.assert_close(model(IDS).logits, saved["de"])
    with pytest.raises(NameTakenError, match="upper and lower case"):
        store.add(tmp_path / "de", "EN", replace=True)


def test_removing_leaves_what_the_store_did_not_write(store: PromptStore) -> None:
    notes = store.folder / "en" / "notes.txt"
    notes.write_text("mine")
    store.remove("en")
    store.remove("de")
    assert store.names() == []
    assert [path for path in store.folder.rglob("*") if path.is_file()] == [notes]
    assert not (store.folder / "de").exists()
    with pytest.raises(NotAttachedError, match="no prompt named 'en'"):
        store.remove("en")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_store(name: str, store: PromptStore, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "en", tmp_path / "store" / "a.b")  # a folder whose name cannot be a prompt's
    assert name not in store
    assert store.names() == ["de", "en"]
    with pytest.raises(OptionError, match="cannot be a prompt's name; use at most 128 characters"):
        store.add(tmp_path / "en", name)
    for use in (store.path, store.remove, store.tags, store.tag, lambda name: store.load(zoo.build("llama"), name)):
        with pytest.raises(NotAttachedError, match="no prompt named"):
            use(name)
    assert (tmp_path / "en" / TENSORS).exists()


@pytest.mark.parametrize("tag", ["", "../x", "a b", "-x", "a" * 65, "a\n", 3])
def test_tags_are_words(tag: Any, store: PromptStore) -> None:
    with pytest.raises(OptionError, match="cannot be a tag"):
        store.tag("de", tag)
    assert store.tags("de") == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"tags": "x"}', b'{"tags": ["../x"]}', b'{"tags": [1]}', b"\xff", b"[" * 9999]
)
def test_damaged_tags_are_refused(content: bytes, store: PromptStore) -> None:
    (store.folder / "en" / TAGS).write_bytes(content)
    with pytest.raises(CheckpointError, match=TAGS):
        store.tags("en")
    with pytest.raises(CheckpointError, match=TAGS):
        store.names(tag="v2")
    assert store.names() == ["de", "en"]


# --- the base model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 64}], ids=["weights", "sizes"])
def test_a_store_is_for_one_base(sizes: dict[str, int], store: PromptStore, tmp_path: Path) -> None:
    model = zoo.build("llama", seed=9, **sizes)
    prompt = softhooks.attach(model, PromptTuning(2))
    with pytest.raises(PromptMismatchError, match="belong to another base model than 'other'"):
        store.add(prompt, "other")
    prompt.remove()
    assert "other" not in store
    with pytest.raises(PromptMismatchError), untouched.untouched(model):
        store.load(model, "en")


def test_a_base_in_another_precision_is_the_same_base(store: PromptStore) -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    with softhooks.attach(model, PromptTuning(2)) as prompt:
        store.add(prompt, "low")
    store.load(model, "en")


def test_a_prompt_that_does_not_describe_its_base_is_refused(store: PromptStore, tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(2)) as prompt:
        prompt.save_pretrained(tmp_path / "adapter", as_peft=True)
    with pytest.raises(CheckpointError, match="does not describe the weights of its base model"):
        store.add(tmp_path / "adapter", "adapter")
    shutil.copytree(tmp_path / "adapter", store.folder / "adapter")
    assert "adapter" not in store


def test_a_damaged_prompt_does_not_hide_the_others(store: PromptStore, tmp_path: Path) -> None:
    (store.folder / "de" / TENSORS).write_bytes(b"damaged")
    with pytest.raises(CheckpointError):
        store.load(zoo.build("llama"), "de")
    store.add(tmp_path / "en", "again")
    assert store.names() == ["again", "de", "en"]


def test_a_store_is_no_prompt_and_no_file(tmp_path: Path, saved: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="is a saved prompt; a store is a folder"):
        PromptStore(tmp_path / "en")
    with pytest.raises(OptionError, match="is a file"):
        PromptStore(tmp_path / "en" / DESCRIPTION)


def test_what_is_written_is_what_save_pretrained_writes(store: PromptStore, tmp_path: Path) -> None:
    for name in store:
        (own, described), (given, before) = (
            read_tensors(folder / name / TENSORS) for folder in (store.folder, tmp_path)
        )
        assert described == before
        torch.testing.assert_close(own, given, rtol=0, atol=0)
    assert json.loads((store.folder / "en" / TAGS).read_text()) == {"tags": ["production", "v2"]}


def test_a_prompt_in_the_folder_without_a_fingerprint_is_loaded_only_on_request(store: PromptStore) -> None:
    stored = read(store.folder / "en")
    softhooks_files.write(replace(stored, base=replace(stored.base, fingerprint=None)), store.folder / "by_hand")
    model = zoo.build("llama")
    with pytest.raises(CheckpointError, match="does not describe the weights"):
        store.load(model, "by_hand")
    assert store.load(model, "by_hand", strict=False).is_attached


def test_the_options_of_load_are_passed_on(store: PromptStore) -> None:
    model, other = zoo.build("llama"), zoo.build("llama", seed=9)
    frozen, trained = store.load(model, "en"), store.load(model, "de", as_name="x", trainable=True)
    assert not any(one.requires_grad for one in frozen.parameters())
    assert any(one.requires_grad for one in trained.parameters())
    assert trained.name == "x"
    with pytest.raises(PromptMismatchError):
        store.load(other, "en")
    assert store.load(other, "en", strict=False).is_attached

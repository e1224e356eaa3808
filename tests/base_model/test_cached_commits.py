"""The commit that a model was loaded from, found in the cache by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from hub_stand_in import HubStandIn

from softhooks.base_model.cached_commits import REPOSITORY, cached_commits

BASE = "org/base"


def publish(hub: HubStandIn, folder: Path, seed: int, head: str = "causal", arch: str = "llama") -> str:
    """Commit a model with other weights, and download it into the cache."""
    zoo.build(arch, head, seed=seed).save_pretrained(folder / str(seed))
    return hub.add(BASE, folder / str(seed))


def load(revision: str = "main", cls: Any = tf.AutoModelForCausalLM, **options: Any) -> Any:
    return cls.from_pretrained(BASE, revision=revision, **options)


def test_the_commit_of_a_revision_is_found_among_others(hub: HubStandIn, tmp_path: Path) -> None:
    commits = [publish(hub, tmp_path, seed) for seed in (1, 2, 3)]
    for commit in (*commits, *commits):
        assert cached_commits(load(commit), BASE) == [commit]
    assert cached_commits(load(), BASE) == [commits[-1]]


def test_commits_with_the_same_weights_are_all_found_and_main_is_the_first(hub: HubStandIn, tmp_path: Path) -> None:
    first = publish(hub, tmp_path, 1)
    load(first)
    for text in (b"one", b"two"):
        last = hub.repositories[BASE].commit({"README.md": text})
        model = load()
    assert cached_commits(model, BASE)[0] == last
    assert first in cached_commits(model, BASE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_precision_is_recognized(dtype: torch.dtype, hub: HubStandIn, tmp_path: Path) -> None:
    commit = publish(hub, tmp_path, 1)
    publish(hub, tmp_path, 2)
    load()
    assert cached_commits(load(commit, dtype=dtype), BASE) == [commit]


@pytest.mark.parametrize("cls", [tf.AutoModel, tf.AutoModelForSequenceClassification, tf.AutoModelForMaskedLM])
def test_another_head_is_recognized(cls: Any, hub: HubStandIn, tmp_path: Path) -> None:
    commit = publish(hub, tmp_path, 1, "masked", "bert")
    publish(hub, tmp_path, 2, "masked", "bert")
    load(cls=tf.AutoModel)
    assert cached_commits(load(commit, cls), BASE) == [commit]


def test_a_model_that_was_changed_or_is_not_in_the_cache_has_no_commit(hub: HubStandIn, tmp_path: Path) -> None:
    publish(hub, tmp_path, 1)
    model = load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert cached_commits(model, BASE) == []
    assert cached_commits(model.to("meta"), BASE) == []
    assert cached_commits(zoo.build("llama", seed=1), "org/other") == []
    for name in ("", "/etc", "../base", "a/b/c", "org/base\n", "org//base"):
        assert REPOSITORY.fullmatch(name) is None
        assert cached_commits(zoo.build("llama", seed=1), name) == []


def test_a_damaged_file_in_the_cache_is_left_out(hub: HubStandIn, tmp_path: Path) -> None:
    commit = publish(hub, tmp_path, 1)
    model = load()
    assert cached_commits(model, BASE) == [commit]
    [weights] = (tmp_path / "hub-cache").rglob("snapshots/*/model.safetensors")
    weights.resolve().write_bytes(b"damaged")
    assert cached_commits(model, BASE) == []

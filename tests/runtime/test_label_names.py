"""Label names are saved with a head, and the config shows them only while its prompt is on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokens
import torch
import training
import transformers as tf
import zoo
from safetensors import safe_open
from safetensors.torch import save_file

import softhooks
from softhooks import CheckpointError, PromptTuning, SoftPromptCallback
from softhooks.formats.softhooks_files import DESCRIPTION, TENSORS

NAMES = ("NEGATIVE", "NEUTRAL", "POSITIVE")


def named(arch: str = "bert", head: str = "sequence", names: tuple[str, ...] = NAMES, problem: Any = None) -> Any:
    model = zoo.build(arch, head, num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.problem_type = problem
    return model


def saved(folder: Path, model: Any) -> Path:
    softhooks.attach(model, PromptTuning(4)).save_pretrained(folder)
    return folder


def shown(model: Any) -> list[str]:
    return list(model.config.id2label.values())


def held(model: Any) -> tuple[Any, ...]:
    return model.config.id2label, model.config.label2id, model.config.num_labels, model.config.problem_type


@pytest.mark.parametrize("arch", ["bert", "llama", "bart"])
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (NAMES, None),
        (NAMES, "single_label_classification"),
        (NAMES, "multi_label_classification"),
        (("score",), "regression"),
    ],
)
def test_names_are_restored_and_undone(names: tuple[str, ...], problem: Any, arch: str, tmp_path: Path) -> None:
    saved(tmp_path, before := named(arch, names=names, problem=problem))
    fresh = zoo.build(arch, "sequence", num_labels=len(names))
    bare = copy.deepcopy(fresh.config.to_dict())
    prompt = softhooks.load(fresh, tmp_path)
    assert held(fresh) == held(before)
    with softhooks.disabled(fresh):
        assert fresh.config.to_dict() == bare
    assert held(fresh) == held(before)
    prompt.remove()
    assert fresh.config.to_dict() == bare


@pytest.mark.parametrize("head", ["sequence", "tokens"])
def test_a_pipeline_says_the_names(head: str, tmp_path: Path) -> None:
    tokenizer = tokens.masked()
    task = {"sequence": "text-classification", "tokens": "token-classification"}[head]
    text = tokenizer.decode(zoo.text(1, 5)[0])

    def labels(model: Any) -> set[str]:
        found = tf.pipeline(task, model=model, tokenizer=tokenizer)(text)
        return {one.get("label") or one["entity"] for one in found}

    model = named(head=head)
    trainer = training.make(tmp_path, model, head, [SoftPromptCallback(PromptTuning(4))])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = labels(model)
    assert expected <= set(NAMES)
    fresh = zoo.build("bert", head)
    with softhooks.load(fresh, tmp_path / "saved"):
        assert labels(fresh) == expected
        with softhooks.disabled(fresh):
            assert all(name.startswith("LABEL_") for name in labels(fresh))
    assert all(name.startswith("LABEL_") for name in labels(fresh))


def test_each_prompt_shows_its_own(tmp_path: Path) -> None:
    colors, animals = ("red", "green", "blue"), ("cat", "dog", "cow")
    saved(tmp_path / "colors", named(names=colors))
    saved(tmp_path / "animals", named(names=animals))
    saved(tmp_path / "none", zoo.build("bert", "masked"))
    model = zoo.build("bert", "sequence")
    own = shown(model)
    one = softhooks.load(model, tmp_path / "colors", "colors")
    other = softhooks.load(model, tmp_path / "animals", "animals")
    softhooks.attach(model, PromptTuning(3), "new")
    assert shown(model) == own, "a new head is a copy of the model's"
    for name, names in {"colors": list(colors), "animals": list(animals), "new": own}.items():
        softhooks.activate(model, name)
        assert shown(model) == names
    softhooks.load(model, tmp_path / "none", "headless", strict=False)
    assert shown(model) == own, "without a head of its own the model's answers"
    softhooks.activate(model, "animals")
    one.save_pretrained(tmp_path / "again")
    assert list(json.loads((tmp_path / "again" / DESCRIPTION).read_text())["labels"]["id2label"].values()) == list(
        colors
    )
    other.remove()
    assert shown(model) == own
    softhooks.activate(model, "colors")
    model.save_pretrained(tmp_path / "all")
    with softhooks.disabled(model):
        model.save_pretrained(tmp_path / "base")
    assert list(tf.AutoConfig.from_pretrained(tmp_path / "base").id2label.values()) == own
    assert shown(model) == list(colors)


def test_names_given_after_attach_are_saved_and_stay(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    prompt = softhooks.attach(model, PromptTuning(4))
    model.config.id2label = dict(enumerate(NAMES))
    prompt.save_pretrained(tmp_path)
    prompt.remove()
    assert shown(model) == list(NAMES), "the script has named the model's labels, not the prompt"
    fresh = zoo.build("bert", "sequence")
    softhooks.load(fresh, tmp_path)
    assert shown(fresh) == list(NAMES)


def test_names_set_between_two_prompts_belong_to_the_second() -> None:
    model = named()
    softhooks.attach(model, PromptTuning(4), "one")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    softhooks.attach(model, PromptTuning(4), "two")
    assert shown(model) == ["a", "b", "c"]
    softhooks.activate(model, "one")
    assert shown(model) == list(NAMES)
    softhooks.activate(model, "two")
    assert shown(model) == ["a", "b", "c"]


def test_a_copy_has_names_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path, named())
    fresh = zoo.build("bert", "sequence")
    softhooks.load(fresh, tmp_path)
    twin = copy.deepcopy(fresh)
    with softhooks.disabled(twin):
        assert shown(twin)[0] == "LABEL_0"
        assert shown(fresh) == list(NAMES)
    assert shown(twin) == list(NAMES)


def test_a_refused_load_leaves_the_names(tmp_path: Path) -> None:
    saved(tmp_path, named())
    other = zoo.build("bert", "sequence", num_labels=5)
    with pytest.raises(softhooks.PromptMismatchError, match="head"):
        softhooks.load(other, tmp_path)
    assert shown(other) == [f"LABEL_{number}" for number in range(5)]


def test_a_language_model_has_no_names(tmp_path: Path) -> None:
    saved(tmp_path, zoo.build("llama"))
    assert "labels" not in json.loads((tmp_path / DESCRIPTION).read_text())


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "none of them": lambda _labels: [],
    "another count": lambda labels: {**labels, "num_labels": 4},
    "more than rows": lambda labels: {**labels, "id2label": {str(n): "x" for n in range(9)}, "num_labels": 9},
    "a gap": lambda labels: {**labels, "id2label": {"0": "a", "1": "b", "3": "c"}},
    "no number": lambda labels: {**labels, "id2label": {"0": "a", "1": "b", "two": "c"}},
    "no name": lambda labels: {**labels, "id2label": {"0": "a", "1": "b", "2": 7}},
    "a number beyond": lambda labels: {**labels, "label2id": {"a": 3}},
    "a truth value": lambda labels: {**labels, "label2id": {"a": True}},
    "another problem": lambda labels: {**labels, "problem_type": "ranking"},
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_names_in_a_file_are_not_trusted(spoil: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    saved(tmp_path, named())
    with safe_open(tmp_path / TENSORS, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    told = json.loads(metadata["softhooks"])
    told["labels"] = spoil(told["labels"])
    save_file(tensors, tmp_path / TENSORS, {**metadata, "softhooks": json.dumps(told)})
    with pytest.raises(CheckpointError, match=r"label names in .* are malformed"):
        softhooks.load(zoo.build("bert", "sequence"), tmp_path)


def test_a_file_without_names_loads_as_before(tmp_path: Path) -> None:
    saved(tmp_path, named())
    with safe_open(tmp_path / TENSORS, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    told = json.loads(metadata["softhooks"])
    del told["labels"]
    save_file(tensors, tmp_path / TENSORS, {**metadata, "softhooks": json.dumps(told)})
    fresh = zoo.build("bert", "sequence")
    softhooks.load(fresh, tmp_path)
    assert shown(fresh)[0] == "LABEL_0"
    assert torch.isfinite(fresh(zoo.text()).logits).all()

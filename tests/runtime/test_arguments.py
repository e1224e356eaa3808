"""Batch columns: refused if no active prompt takes them, dropped if all prompts are off."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import zoo
from table import TABLE
from untouched import remove_all

import softhooks
from softhooks import (
    Layout,
    LlamaAdapter,
    MultitaskPromptTuning,
    NotAttachedError,
    OptionError,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SoftPromptCallback,
    UnsupportedModeError,
)
from softhooks.method import COLUMN_METHODS

IDS = zoo.text(2, 6)
COLUMNS: dict[str, Any] = {
    "task_ids": torch.tensor([0, 1]),
    "example_ids": torch.tensor([0, 1]),
    "prompt_context": torch.randn(2, 32),
    "soft_slots": torch.zeros(2, 4, dtype=torch.long),
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def multitask() -> MultitaskPromptTuning:
    return MultitaskPromptTuning(4, tasks=["a", "b"])


def test_the_columns_of_all_methods_are_known() -> None:
    assert set(COLUMN_METHODS) == {*COLUMNS}
    for entry in TABLE:
        method = entry.make(4)
        assert set(method.batch_columns) <= {*method.columns, *method.optional_columns}
    assert PTuning(layout=Layout("{soft:4} {a} {mask}")).batch_columns == ("soft_slots",)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("way", ["model", "stack", "generate"])
def test_a_column_that_no_prompt_takes_is_refused_by_name(way: str, arch: str, column: str) -> None:
    """Models with **kwargs swallow it, others raise a TypeError of their own."""
    head = {"bert": "masked", "t5": "seq2seq"}.get(arch, "causal")
    model = zoo.build(arch, head)
    if way == "generate" and head == "masked":
        return
    call: dict[str, Any] = {"input_ids": IDS, "decoder_input_ids": IDS} if head == "seq2seq" else {"input_ids": IDS}
    prompt = softhooks.attach(model, PrefixTuning(4) if arch == "bert" else PromptTuning(4))
    given = {column: COLUMNS[column]}
    match = rf"(?s){column}.*{COLUMN_METHODS[column][0].split()[0]}"
    ways = {
        "model": lambda: model(**call, **given),
        "stack": lambda: prompt.prompted_model.structure.entry.module(input_ids=IDS, **given),
        "generate": lambda: model.generate(IDS, max_new_tokens=2, **given),
    }
    with pytest.raises(UnsupportedModeError, match=match):
        ways[way]()
    model(**call, **{column: None} if way == "stack" and arch == "llama" else {})
    assert prompt.is_attached


def test_a_column_of_a_prompt_that_is_off_is_refused_and_dropped_where_all_are_off() -> None:
    model = zoo.build("llama").eval()
    bare = model(IDS).logits
    softhooks.attach(model, multitask(), "tasks")
    softhooks.attach(model, PromptTuning(4), "plain")
    with pytest.raises(UnsupportedModeError, match="task_ids"):
        model(IDS, task_ids=COLUMNS["task_ids"])
    with pytest.raises(UnsupportedModeError, match="task_ids"):
        model.generate(IDS, max_new_tokens=2, task_ids=COLUMNS["task_ids"])
    with softhooks.disabled(model):
        assert torch.equal(model(IDS, task_ids=COLUMNS["task_ids"]).logits, bare)
        model.generate(IDS, max_new_tokens=2, do_sample=False, task_ids=COLUMNS["task_ids"])
    with softhooks.rows(model, [None, None]):
        assert torch.equal(model(IDS, task_ids=COLUMNS["task_ids"]).logits, bare)
    softhooks.activate(model, "tasks")
    model(IDS, task_ids=COLUMNS["task_ids"])


def test_rows_with_and_without_the_column_share_a_batch() -> None:
    model = zoo.build("llama").eval()
    softhooks.attach(model, multitask(), "tasks")
    softhooks.attach(model, PromptTuning(4), "plain")
    with softhooks.rows(model, ["tasks", "plain"]), torch.no_grad():
        both = model(IDS, task_ids=torch.tensor([1, 0])).logits
        model.generate(IDS, max_new_tokens=2, task_ids=torch.tensor([1, 0]))
    softhooks.activate(model, "plain")
    with torch.no_grad():
        torch.testing.assert_close(both[1:], model(IDS[1:]).logits, rtol=1e-4, atol=1e-5)
    with softhooks.rows(model, ["plain", "plain"]), pytest.raises(UnsupportedModeError, match="task_ids"):
        model(IDS, task_ids=torch.tensor([1, 0]))


def test_an_argument_of_the_model_s_own_is_the_model_s() -> None:
    class Tasked(type(zoo.build("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, task_ids: Any = None, **kwargs: Any) -> Any:
            self.seen = task_ids
            return super().forward(input_ids=input_ids, **kwargs)

    model = zoo.build("llama")
    model.__class__ = Tasked
    softhooks.attach(model, PromptTuning(4))
    model(input_ids=IDS, task_ids=COLUMNS["task_ids"])
    assert model.seen is COLUMNS["task_ids"]


def test_the_signature_names_the_columns_of_the_prompts_in_use() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, multitask(), "tasks")
    softhooks.attach(model, LlamaAdapter(4), "adapter")

    def named() -> set[str]:
        return set(inspect.signature(model.forward).parameters) & set(COLUMN_METHODS)

    assert named() == {"prompt_context"}
    softhooks.activate(model, "tasks")
    assert named() == {"task_ids"}
    with softhooks.disabled(model):
        assert named() == {"task_ids", "prompt_context"}


def test_a_trainer_drops_the_column_of_a_prompt_that_rests(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, multitask(), "tasks")
    rows = [{**row, "task_ids": torch.tensor(number % 2)} for number, row in enumerate(training.rows("causal"))]
    callback = SoftPromptCallback(PromptTuning(4), name="plain")
    trainer = training.make(tmp_path, model, "causal", [callback], given={"train_dataset": rows}, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_trainer_keeps_the_column_that_its_prompt_takes(tmp_path: Path) -> None:
    model = zoo.build("llama")
    rows = [{**row, "task_ids": torch.tensor(number % 2)} for number, row in enumerate(training.rows("causal"))]
    callback = SoftPromptCallback(multitask())
    trainer = training.make(tmp_path, model, "causal", [callback], given={"train_dataset": rows}, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [["a", "b"], ("a",), None, 3, {"a"}, b"a", True])
def test_activate_takes_one_name_and_says_what_takes_several(name: Any) -> None:
    model = zoo.build("llama")
    for each in ("a", "b"):
        softhooks.attach(model, PromptTuning(4), each)
    with pytest.raises(OptionError, match=r"(?s)'a', 'b'.*softhooks\.rows.*PromptEnsemble.*disabled"):
        softhooks.activate(model, name)
    assert softhooks.activate(model, "a").name == "a"
    with pytest.raises(NotAttachedError):
        softhooks.activate(zoo.build("llama"), name)


@pytest.mark.parametrize("names", [None, 3, "ab", [], ["a", 1], [["a"]], {"a": 1}, {"a", "b"}, b"ab"])
def test_rows_and_ensembles_take_lists_of_names(names: Any) -> None:
    model = zoo.build("llama")
    for each in ("a", "b"):
        softhooks.attach(model, PromptTuning(4), each)
    with pytest.raises(OptionError), softhooks.rows(model, names):
        pass
    with pytest.raises(OptionError):
        softhooks.PromptEnsemble(model, names)

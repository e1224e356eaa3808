"""TRL's trainers with the callback: what is trained, on which loss, what is saved, and the refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import tokens
import torch
import training
import zoo
from datasets import Dataset
from table import BY_NAME, TABLE, TRAINED, Entry
from torch.nn import functional
from trl_runs import DATA, DOCUMENTS, build, metrics, plain_tokenizer, prompted
from untouched import remove_all

import softhooks
from softhooks import MultitaskPromptTuning, PrefixTuning, PromptTuning, SoftPromptCallback, UnsupportedModeError
from softhooks.integrations.trl import reference

METHODS = [PromptTuning(4), PrefixTuning(4)]
NAMES = ["prompt", "prefix"]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("kind", DATA)
def test_only_the_prompt_trains(tmp_path: Path, kind: str, method: Any) -> None:
    model = build(kind)
    base = training.base_of(model)
    given = {"ref_model": reference(model)} if kind in ("DPO", "KTO") else {}
    trainer, callback = prompted(kind, tmp_path, model, method, given=given)
    assert trainer.args.gradient_checkpointing, "TRL's default"
    start = training.trained(callback)
    assert ("soft_prompt.default.heads.score.weight" in start) == (kind == "Reward")
    trainer.train()
    assert not [name for name, value in training.trained(callback).items() if torch.equal(value, start[name])]
    assert all("soft_prompt/norm" in entry for entry in training.logs(trainer))
    assert callback.soft_prompt is not None
    callback.soft_prompt.verify_frozen()
    callback.soft_prompt.remove()
    assert training.equal(training.base_of(model), base)
    assert all(parameter.requires_grad for parameter in model.parameters())
    logits = model(input_ids=zoo.text()).logits
    assert torch.equal(logits, build(kind)(input_ids=zoo.text()).logits)


def expected_loss(model: Any, rows: list[list[int]], labeled: list[int] | None = None, **more: Any) -> float:
    """The mean loss over every token but the first of each row, or over the last few of each, row by row."""
    losses = []
    for number, row in enumerate(rows):
        ids = torch.tensor([row])
        count = len(row) - 1 if labeled is None else labeled[number]
        with torch.no_grad():
            logits = model(input_ids=ids, **more).logits[0, :-1]
        losses.append(functional.cross_entropy(logits[-count:], ids[0, -count:], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(
    "entry", [e for e in TABLE if e.fits(zoo.Case("llama", "causal")) and not e.extra([0]) and not e.make(4).objective()],
    ids=str,
)  # fmt: skip
def test_supervised_training_runs_on_the_loss_with_the_prompt(tmp_path: Path, entry: Entry) -> None:
    model = build("SFT")
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 6}
    trainer, callback = prompted("SFT", tmp_path, model, steady(entry.make(4)), **options)
    assert callback.soft_prompt is not None
    entry.wake(callback.soft_prompt)
    bare = expected_loss(build("SFT"), DOCUMENTS)
    trainer.train()
    model.eval()
    assert training.losses(trainer)[0] == pytest.approx(expected_loss(model, DOCUMENTS), rel=1e-5)
    assert abs(training.losses(trainer)[0] - bare) > 1e-4


def steady(method: Any) -> Any:
    """The method with its own dropout off."""
    drops = {name: 0.0 for name in ("dropout", "token_dropout") if getattr(method, name, None)}
    return dataclasses.replace(method, **drops)


def test_a_column_of_the_prompts_comes_through_a_collator_of_ones_own(tmp_path: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=zoo.PAD)

    def with_tasks(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**collate(rows), "task_ids": torch.tensor([row["task_ids"] for row in rows])}

    tasks = [row % 2 for row in range(len(DOCUMENTS))]
    given = {"train_dataset": DATA["SFT"].add_column("task_ids", tasks), "data_collator": with_tasks}
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 6}
    method = MultitaskPromptTuning(4, tasks=["a", "b"], sampling=None)
    model = build("SFT")
    trainer, callback = prompted("SFT", tmp_path, model, method, given=given, remove_unused_columns=False, **options)
    assert callback.soft_prompt is not None
    with torch.no_grad():
        for parameter in callback.soft_prompt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer.train()
    model.eval()
    wanted = [expected_loss(model, [row], task_ids=torch.tensor([t])) for row, t in zip(DOCUMENTS, tasks, strict=True)]
    counts = [len(row) - 1 for row in DOCUMENTS]
    mean = sum(loss * count for loss, count in zip(wanted, counts, strict=True)) / sum(counts)
    assert training.losses(trainer)[0] == pytest.approx(mean, rel=1e-5)
    remove_all()
    trainer, _ = prompted("SFT", tmp_path, build("SFT"), method, **options)
    with pytest.raises(UnsupportedModeError, match="the call has no `task_ids`"):
        trainer.train()


# --- packed rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("entry", TRAINED, ids=str)
@pytest.mark.parametrize(
    "packing",
    [{"packing": True, "max_length": 12}, {"padding_free": True, "max_length": None}],
    ids=["bfd", "padding-free"],
)
def test_packed_rows_train_as_rows_of_their_own_do(
    tmp_path: Path, packing: dict[str, Any], entry: Entry, attention: str
) -> None:
    options = {"max_steps": 2, "per_device_train_batch_size": 6, "optim": "sgd"}
    results = []
    for number, how in enumerate(({"max_length": 12}, packing)):
        model = zoo.build("llama", attention=attention)
        method = steady(entry.make(4))
        trainer, callback = prompted("SFT", tmp_path / str(number), model, method, **how, **options)
        trainer.train()
        results.append((training.losses(trainer), training.trained(callback), len(trainer.train_dataset)))
    assert results[1][2] == (6 if "padding_free" in packing else 3), "documents share rows"
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-5)


def test_wrapped_rows_are_rows_and_not_documents(tmp_path: Path) -> None:
    model = build("SFT")
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 6}
    trainer, _ = prompted(
        "SFT", tmp_path, model, PrefixTuning(4), packing=True, packing_strategy="wrapped", max_length=10, **options
    )
    trainer.train()
    joined = [token for document in DOCUMENTS for token in document]
    rows = [joined[start : start + 10] for start in range(0, len(joined), 10)]
    model.eval()
    assert training.losses(trainer)[0] == pytest.approx(expected_loss(model, rows), rel=1e-5)


# --- a part of the labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [True, False])
def test_the_loss_is_that_of_completions_only(tmp_path: Path, only: bool) -> None:
    model = build("SFT")
    rows = [row[:8] for row in DOCUMENTS]
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[0] * 2 + [1] * (len(row) - 2) for row in rows]})
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 6}
    trainer, _ = prompted(
        "SFT", tmp_path, model, PromptTuning(4), given={"train_dataset": data}, completion_only_loss=only, **options
    )
    trainer.train()
    model.eval()
    wanted = expected_loss(model, rows, [len(row) - 2 for row in rows] if only else None)
    assert training.losses(trainer)[0] == pytest.approx(wanted, rel=1e-5)


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)


def test_the_loss_is_that_of_the_assistant_only(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = CHAT
    turns = [(zoo.text(1, 4, seed=row)[0].tolist(), zoo.text(1, 2 + row, seed=9 + row)[0].tolist()) for row in range(4)]
    chats = [
        [{"role": "user", "content": tokens.words(asked)}, {"role": "assistant", "content": tokens.words(told)}]
        for asked, told in turns
    ]
    model = build("SFT")
    given = {"train_dataset": Dataset.from_dict({"messages": chats}), "processing_class": tokenizer}
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "assistant_only_loss": True}
    trainer, _ = prompted("SFT", tmp_path, model, PromptTuning(4), given=given, **options)
    trainer.train()
    model.eval()
    wanted = expected_loss(model, [asked + told for asked, told in turns], [len(told) for _, told in turns])
    assert training.losses(trainer)[0] == pytest.approx(wanted, rel=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [
    ("SFT", "prompt"), ("SFT", "prefix-mlp"), ("DPO", "prefix-mlp"), ("KTO", "prompt"), ("Reward", "prefix-mlp"),
    ("GRPO", "prompt"),
])  # fmt: skip
def test_a_run_resumes_bit_for_bit_from_a_checkpoint_that_holds_the_prompt(
    tmp_path: Path, kind: str, name: str
) -> None:
    def run() -> tuple[Any, SoftPromptCallback]:
        model = build(kind)
        given = {"ref_model": reference(model)} if kind in ("DPO", "KTO") else {}
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return prompted(kind, tmp_path, model, BY_NAME[name].make(4), given=given, **options)

    whole, first = run()
    whole.train()
    wanted, logged = training.trained(first), metrics(whole)
    checkpoint = tmp_path / "checkpoint-2"
    weights = {file.name: file.stat().st_size for file in checkpoint.glob("*.safetensors")}
    assert set(weights) == {"soft_prompt.safetensors", "soft_prompt.live.safetensors"}
    assert sum(weights.values()) < 20_000 < sum(value.nbytes for value in training.base_of(whole.model).values())
    assert not (checkpoint / "config.json").exists()
    remove_all()

    again, second = run()
    training.spoil(second)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert training.equal(training.trained(second), wanted)
    assert metrics(again)[2:] == logged[2:]

    again.save_model(str(tmp_path / "prompt"))
    fresh = build(kind)
    again.model.eval()
    with softhooks.load(fresh, tmp_path / "prompt"):
        text = zoo.text()
        torch.testing.assert_close(fresh(input_ids=text).logits, again.model(input_ids=text).logits)

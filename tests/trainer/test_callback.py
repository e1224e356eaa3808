"""SoftPromptCallback: an unmodified Trainer trains the prompt, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
import transformers as tf
import zoo
from trainings import METHODS
from untouched import differences, remove_all, same_bits, snapshot

import softhooks
from softhooks import (
    FrozenModifiedError,
    NameTakenError,
    PrefixTuning,
    PromptTuning,
    SoftPromptCallback,
    TrainerError,
)

TASKS = [("llama", "causal"), ("bert", "sequence"), ("bert", "tokens"), ("t5", "seq2seq")]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


class Rogue(tf.TrainerCallback):
    """A foreign callback that writes to a weight of the base."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].get_parameter(self.name).view(-1)[0] += 1e-6


def _ours(found: list[str]) -> list[str]:
    """Leave out what the Trainer itself changes on a model."""
    return [name for name in found if not name.endswith(("[training]", "config", "[_is_accelerate_prepared]"))]


# --- the main road ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("arch", "head"), TASKS)
def test_only_the_prompt_trains_and_loads_elsewhere(tmp_path: Path, arch: str, head: str, method: str) -> None:
    model = zoo.build(arch, head)
    base = training.base_of(model)
    trainer, callback = training.prompted(tmp_path, model, head, METHODS[method], max_steps=12)
    assert callback.soft_prompt is not None
    start = training.trained(callback)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    after = training.trained(callback)
    assert all(name.startswith("soft_prompt.default.") for name in after)
    assert any(".heads." in name for name in after) == (head in ("sequence", "tokens"))
    assert not [name for name in after if torch.equal(after[name], start[name])]
    assert training.equal(training.base_of(model), base)
    assert callback.report is not None
    assert callback.report.tensors >= len(dict(zoo.build(arch, head).named_parameters()))

    trainer.save_model(str(tmp_path / "saved"))
    written = {file.name for file in (tmp_path / "saved").iterdir()}
    assert written == {"soft_prompt.json", "soft_prompt.safetensors", "training_args.bin"}
    fresh = zoo.build(arch, head)
    softhooks.load(fresh, tmp_path / "saved")
    batch = tf.default_data_collator(training.rows(head))
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, fresh(**batch).logits)
        assert not torch.equal(fresh(**batch).logits, zoo.build(arch, head)(**batch).logits)
    callback.soft_prompt.remove()
    assert training.equal(model.state_dict(), base)


def test_removing_gives_the_model_back_after_a_training(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    before = snapshot(model)
    trainer, callback = training.prompted(
        tmp_path, model, "sequence", METHODS["prefix"], save_strategy="steps", save_steps=2
    )
    trainer.train()
    assert callback.soft_prompt is not None
    callback.soft_prompt.remove()
    assert not _ours(differences(before, snapshot(model)))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_seq2seq_predicts_with_generate(tmp_path: Path, method: str) -> None:
    model = zoo.build("t5", "seq2seq")
    trainer, _ = training.prompted(
        tmp_path,
        model,
        "seq2seq",
        METHODS[method],
        cls=tf.Seq2SeqTrainer,
        predict_with_generate=True,
        generation_max_length=6,
    )
    trainer.train()
    predicted = trainer.predict(training.rows("seq2seq")[:3]).predictions
    batch = tf.default_data_collator(training.rows("seq2seq")[:3])
    with torch.no_grad():
        expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6)
        with softhooks.disabled(model):
            bare = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6)
    assert predicted.shape[0] == 3
    assert np.array_equal(predicted[:, : expected.shape[1]], expected.numpy())
    assert expected.shape != bare.shape or not torch.equal(expected, bare)


@pytest.mark.parametrize(("arch", "head"), [("llama", "causal"), ("bert", "tokens"), ("gpt2", "sequence")])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_metrics_see_the_bare_shapes(tmp_path: Path, arch: str, head: str, method: str) -> None:
    seen: list[tuple[Any, Any]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": 1.0}

    model = zoo.build(arch, head)
    last = zoo.VOCABULARY if head == "causal" else 3
    trainer, _ = training.prompted(tmp_path, model, head, METHODS[method], given={"compute_metrics": metrics})
    trainer.evaluate()
    expected = ((4, 6, last), (4, 6)) if head != "sequence" else ((4, last), (4,))
    assert seen == [expected]


# --- optimizers that are there already --------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_a_users_optimizer_is_mended_in_place(tmp_path: Path, named: bool) -> None:
    model = zoo.build("bert", "sequence")
    base = training.base_of(model)
    items: Any = list(model.named_parameters())
    head = [item for item in items if item[0].startswith("classifier")]
    body = [item for item in items if not item[0].startswith("classifier")]
    if not named:
        head, body = [item[1] for item in head], [item[1] for item in body]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 0.02}, {"params": head, "lr": 0.5}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer, callback = training.prompted(
        tmp_path, model, "sequence", METHODS["prompt"], given={"optimizers": (optimizer, scheduler)}, max_steps=3
    )
    prompt = callback.soft_prompt
    assert prompt is not None
    first, second = (group["params"] for group in optimizer.param_groups)
    assert [id(item) for item in first] == [id(item) for item in prompt.encoder.parameters()]
    assert [id(item) for item in second] == [id(item) for item in prompt.heads.parameters()]
    start = training.trained(callback)
    trainer.train()
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 8, 0.5 / 8]
    assert len(optimizer.state) == 3
    assert all(not torch.equal(value, start[name]) for name, value in training.trained(callback).items())
    assert training.equal(training.base_of(model), base)
    moved = (prompt.heads["classifier"].weight - model.classifier.weight).abs().max()
    assert moved > 0.3, "the head must train at its own group's rate"
    if named:
        assert [group["param_names"] for group in optimizer.param_groups] == [
            ["soft_prompt.default.encoder.embeddings"],
            ["soft_prompt.default.heads.classifier.weight", "soft_prompt.default.heads.classifier.bias"],
        ]
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_optimizer_that_has_been_used_forgets_the_base(tmp_path: Path) -> None:
    model = zoo.build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(input_ids=zoo.text(), labels=zoo.text()).loss.backward()
    optimizer.step()
    trainer, callback = training.prompted(
        tmp_path, model, "causal", METHODS["prefix"], given={"optimizers": (optimizer, None)}
    )
    assert not optimizer.state
    assert callback.soft_prompt is not None
    trainer.train()
    assert set(optimizer.state) == set(callback.soft_prompt.parameters())


def test_a_prompt_among_several_rates_says_which_it_takes(tmp_path: Path) -> None:
    model = zoo.build("llama")
    half = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": half[:5], "lr": 0.1}, {"params": half[5:], "lr": 0.2}])
    with training.logged() as messages:
        training.prompted(tmp_path, model, "causal", METHODS["prompt"], given={"optimizers": (optimizer, None)})
    assert any("lr=0.1" in message for message in messages)


def test_an_optimizer_without_groups_is_refused() -> None:
    model = zoo.build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer.param_groups.clear()
    with softhooks.attach(model, METHODS["prompt"]) as prompt, pytest.raises(TrainerError, match="group"):
        softhooks.trainer.optimizer.mend_optimizer(optimizer, prompt)


def test_a_trainer_that_is_refused_after_it_attached_leaves_the_model_bare(tmp_path: Path) -> None:
    model = zoo.build("llama")
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer.param_groups.clear()
    with pytest.raises(TrainerError, match="group"):
        training.prompted(tmp_path, model, "causal", METHODS["prompt"], given={"optimizers": (optimizer, None)})
    assert not differences(before, snapshot(model))


# --- models that come late --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"optim": "adafactor", "weight_decay": 0.1},
    ],
    ids=["plain", "bf16", "checkpointing", "adafactor"],
)
def test_a_callback_added_after_construction_trains_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    method = PromptTuning(4, init="tensor", init_tensor=torch.randn(4, 32))
    reference, expected = training.prompted(tmp_path / "a", zoo.build("llama"), "causal", method, **options)
    reference.train()
    model = zoo.build("llama")
    base = training.base_of(model)
    trainer = training.make(tmp_path / "b", model, "causal", [], **options)
    callback = SoftPromptCallback(method)
    trainer.add_callback(callback)
    trainer.train()
    assert training.equal(training.base_of(model), base)
    assert callback.report is not None
    assert training.losses(trainer) == training.losses(reference)
    assert training.equal(training.trained(callback), training.trained(expected))


def test_a_late_prompt_in_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    trainer = training.make(tmp_path, model, "causal", [])
    callback = SoftPromptCallback(METHODS["prompt"])
    monkeypatch.setattr(tf.TrainingArguments, "world_size", property(lambda self: 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TrainerError, match="training is distributed"):
        callback.on_train_begin(trainer.args, tf.TrainerState(), tf.TrainerControl(), model=model, optimizer=optimizer)
    assert not hasattr(model, "soft_prompt")


def test_model_init_gets_the_prompt_at_the_start_of_training(tmp_path: Path) -> None:
    made: list[Any] = []

    def build() -> Any:
        made.append(zoo.build("bert", "sequence"))
        return made[-1]

    trainer, callback = training.prompted(tmp_path, None, "sequence", METHODS["prompt"], given={"model_init": build})
    trainer.train()
    assert len(made) == 2
    assert callback.soft_prompt is not None
    assert callback.soft_prompt.model is made[1] is trainer.model
    assert not hasattr(made[0], "soft_prompt")
    assert training.equal(training.base_of(made[1]), training.base_of(made[0]))
    assert training.losses(trainer)[-1] != training.losses(trainer)[0]


def test_a_model_that_was_swapped_in_between(tmp_path: Path) -> None:
    one, other = zoo.build("llama"), zoo.build("llama", seed=5)
    before = snapshot(one)
    trainer, callback = training.prompted(tmp_path, one, "causal", METHODS["prefix"])
    trainer.train()
    base = training.base_of(other)
    trainer.model = trainer.model_wrapped = other
    trainer.train()
    assert callback.soft_prompt is not None
    assert callback.soft_prompt.model is other
    assert training.equal(training.base_of(other), base)
    assert trainer.optimizer is not None
    held = {id(item) for group in trainer.optimizer.param_groups for item in group["params"]}
    assert held == {id(item) for item in callback.soft_prompt.parameters()}
    callback.soft_prompt.remove()
    assert not _ours(differences(before, snapshot(one)))


# --- prompts that are there already -----------------------------------------------------------------------------------


def test_a_second_training_goes_on(tmp_path: Path) -> None:
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"])
    trainer.train()
    once = training.trained(callback)
    trainer.train()
    assert not training.equal(training.trained(callback), once)
    assert callback.report is not None


def test_a_second_trainer_takes_the_prompt_up(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer, first = training.prompted(tmp_path, model, "causal", PromptTuning(4, init="random"))
    trainer.train()
    trained = training.trained(first)
    trainer, second = training.prompted(tmp_path, model, "causal", PromptTuning(4, init="random"))
    assert second.soft_prompt is first.soft_prompt
    assert training.equal(training.trained(second), trained)
    trainer.train()
    assert not training.equal(training.trained(second), trained)


@pytest.mark.parametrize("other", [PromptTuning(5), PrefixTuning(4), PromptTuning(4, placement="after_first")])
def test_another_method_under_the_name_is_refused(tmp_path: Path, other: Any) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, METHODS["prompt"]):
        before = snapshot(model)
        with pytest.raises(NameTakenError) as caught:
            training.prompted(tmp_path, model, "causal", other)
        assert repr(METHODS["prompt"]) in str(caught.value)
        assert repr(other) in str(caught.value)
        assert not differences(before, snapshot(model))


def test_other_options_under_the_name_are_refused(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    with softhooks.attach(model, METHODS["prompt"], train_head=False):
        with pytest.raises(NameTakenError, match="own head"):
            training.prompted(tmp_path, model, "sequence", METHODS["prompt"])
        callback = SoftPromptCallback(METHODS["prompt"], train_head=False, trainable="bert.encoder.layer.0.*")
        with pytest.raises(NameTakenError, match="parameters of the base"):
            training.make(tmp_path, model, "sequence", [callback])


def test_a_loaded_prompt_is_trained_on(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, METHODS["prompt"]) as prompt:
        prompt.save_pretrained(tmp_path / "saved")
    loaded = softhooks.load(model, tmp_path / "saved")
    assert not list(loaded.parameters())
    start = loaded.embeddings().clone()
    trainer, callback = training.prompted(tmp_path, model, "causal", METHODS["prompt"])
    assert callback.soft_prompt is loaded
    trainer.train()
    assert not torch.equal(loaded.embeddings(), start)
    assert callback.report is not None


def test_prompts_are_trained_one_after_the_other(tmp_path: Path) -> None:
    model = zoo.build("llama")
    one = softhooks.attach(model, METHODS["prompt"], "one")
    other = softhooks.attach(model, METHODS["prefix"], "other")
    rested = [parameter.detach().clone() for parameter in other.parameters()]
    callback = SoftPromptCallback(METHODS["prompt"], name="one")
    trainer = training.make(tmp_path, model, "causal", [callback], weight_decay=0.1)
    start = one.embeddings().detach().clone()
    trainer.train()
    assert trainer.optimizer is not None
    assert [id(item) for group in trainer.optimizer.param_groups for item in group["params"]] == [
        id(item) for item in one.parameters()
    ]
    assert not torch.equal(one.embeddings(), start)
    assert training.equal([parameter.detach() for parameter in other.parameters()], rested)
    assert len(list(other.parameters())) == len(rested), "the other prompt wakes when the training is over"


@pytest.mark.parametrize("name", ["default", "other"])
def test_two_callbacks_on_one_trainer_are_refused(tmp_path: Path, name: str) -> None:
    callbacks = [SoftPromptCallback(METHODS["prompt"]), SoftPromptCallback(METHODS["prompt"], name=name)]
    with pytest.raises(TrainerError, match="can train only one prompt"):
        training.make(tmp_path, zoo.build("llama"), "causal", callbacks)


# --- options of the Trainer -------------------------------------------------------------------------------------------


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    results = []
    for size, steps in ((4, 1), (1, 4)):
        trainer, callback = training.prompted(
            tmp_path, zoo.build("llama"), "causal", METHODS["prefix"], per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_steps=3, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        trainer.train()
        results.append(training.trained(callback))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "head", "method"),
    [
        (arch, head, method)
        for arch, head in (("llama", "causal"), ("bert", "sequence"), ("t5", "seq2seq"), ("gptj", "causal"))
        for method in METHODS
        if (arch, method) != ("gptj", "adapter")
    ],
)
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, arch: str, head: str, method: str) -> None:
    results = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        trainer, callback = training.prompted(
            tmp_path, zoo.build(arch, head), head, METHODS[method], max_steps=2, **options
        )
        start = training.trained(callback)
        trainer.train()
        results.append(training.trained(callback))
    for name, value in results[0].items():
        assert not torch.equal(value, start[name]), f"{name} has not moved"
        for other in results[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(("arch", "head"), [("llama", "causal"), ("bert", "sequence")])
def test_bf16_keeps_the_base_and_trains_in_fp32(tmp_path: Path, arch: str, head: str, method: str) -> None:
    model = zoo.build(arch, head)
    base = training.base_of(model)
    trainer, callback = training.prompted(tmp_path, model, head, METHODS[method], bf16=True, max_steps=16)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert training.equal(training.base_of(model), base)
    assert {value.dtype for value in training.trained(callback).values()} == {torch.float32}


def test_a_base_in_bf16_is_trained_with_an_fp32_prompt(tmp_path: Path) -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    trainer, callback = training.prompted(tmp_path, model, "causal", METHODS["prefix"], bf16=True, max_steps=16)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert {value.dtype for value in training.trained(callback).values()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_label_smoothing(tmp_path: Path, method: str) -> None:
    model = zoo.build("llama")
    trainer, _ = training.prompted(tmp_path, model, "causal", METHODS[method], label_smoothing_factor=0.1, max_steps=6)
    with torch.no_grad():
        batch = tf.default_data_collator(training.rows("causal")[:4])
        expected = trainer.label_smoother(model.eval()(**batch), batch["labels"], shift_labels=True).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert training.losses(trainer)[-1] < training.losses(trainer)[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_torch_compile(tmp_path: Path) -> None:
    plain, expected = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prefix"], max_steps=2)
    plain.train()
    model = zoo.build("llama")
    base = training.base_of(model)
    trainer, callback = training.prompted(
        tmp_path, model, "causal", METHODS["prefix"], max_steps=2, torch_compile=True, torch_compile_backend="aot_eager",
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    assert training.equal(training.base_of(model), base)
    for name, value in training.trained(expected).items():
        torch.testing.assert_close(training.trained(callback)[name], value, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "checkpoint-2" / "soft_prompt.json").read_text())["method"] == "prefix_tuning"
    torch._dynamo.reset()


# --- the proof --------------------------------------------------------------------------------------------------------


def test_a_rogue_callback_is_found_out(tmp_path: Path) -> None:
    rogue = Rogue("model.layers.1.mlp.up_proj.weight")
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], rogue)
    with pytest.raises(FrozenModifiedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: values changed"):
        trainer.train()
    assert callback.report is None


def test_the_proof_can_be_left_out(tmp_path: Path) -> None:
    rogue = Rogue("model.layers.1.mlp.up_proj.weight")
    callback = SoftPromptCallback(METHODS["prompt"], check_frozen=False)
    training.make(tmp_path, zoo.build("llama"), "causal", [callback, rogue]).train()
    assert callback.report is None


def test_the_bare_model_is_still_there(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    batch = tf.default_data_collator(training.rows("sequence"))
    with torch.no_grad():
        expected = model(**batch).logits
    trainer, _ = training.prompted(tmp_path, model, "sequence", METHODS["prompt"])
    trainer.train()
    model.eval()
    with torch.no_grad(), softhooks.disabled(model):
        assert same_bits(model(**batch).logits, expected)

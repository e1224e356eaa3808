"""Context-aware prompt tuning in a Trainer, in several processes and in a decorated loop; resuming, and learning."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import contexts
import naive
import peers
import pytest
import tokens
import torch
import training
import transformers as tf
import zoo
from contexts import MOVABLE, TYPES, method, padded, ragged
from cpt_training import collate, data, make, model_of
from launch import SCRIPTS, results
from trainings import Keeper
from untouched import remove_all

import softhooks
from softhooks import ContextAwarePromptTuning, SoftPromptCallback, TrainerError, UnsupportedModeError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import few_shot  # noqa: E402

H = 32
EPSILON = {"epsilon_input": 0.8, "epsilon_format": 0.5}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


class Watch(tf.TrainerCallback):
    """Check the deltas right after the optimizer step."""

    def __init__(self) -> None:
        self.longest: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        encoder = kwargs["model"].soft_prompt["default"]["encoder"]
        scale = math.sqrt(H / 2048)
        bounds = torch.tensor([(0.8 if TYPES[place] % 4 == 2 else 0.5) * scale for place in MOVABLE])
        self.longest.append(float((encoder.delta.detach().double().norm(dim=-1) / bounds.double()).max()))


class Foresee(tf.TrainerCallback):
    """Compute by hand the deltas after plain gradient descent, and how many exceed their bound."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        delta, rate = kwargs["model"].soft_prompt["default"]["encoder"].delta, kwargs["optimizer"].param_groups[0]["lr"]
        lengths = (delta.detach() - rate * delta.grad).double().norm(dim=-1) / math.sqrt(H / 2048)
        bounds = [0.8 if TYPES[place] % 4 == 2 else 0.5 for place in MOVABLE]
        too_far = [float(length) > bound for length, bound in zip(lengths, bounds, strict=True)]
        self.shares.append(sum(too_far) / len(too_far))


def test_the_share_of_projected_tokens_reaches_the_log(tmp_path: Path) -> None:
    own = method(**EPSILON)
    foresee = Foresee()
    trainer, callback = make(
        tmp_path, model_of(), own, foresee, optim="sgd", learning_rate=0.2, max_grad_norm=0.0, max_steps=6,
    )  # fmt: skip
    assert callback.soft_prompt is not None
    assert callback.soft_prompt.encoder.metrics() == {}, "nothing has been projected yet"
    trainer.train()
    shown = [log["soft_prompt/projected"] for log in training.logs(trainer)]
    assert shown == pytest.approx(foresee.shares, abs=1e-6)
    assert len({share for share in shown if 0 < share < 1}) > 1, "some tokens, and not always the same number"

    callback.soft_prompt.save_pretrained(tmp_path / "saved")
    loaded = softhooks.load(model_of(), tmp_path / "saved", trainable=True)
    assert loaded.encoder.metrics() == {}, "loading is no step"
    unbound, _ = make(tmp_path, model_of(), method(epsilon_input=None, epsilon_format=None), learning_rate=1.0)
    unbound.train()
    assert [log["soft_prompt/projected"] for log in training.logs(unbound)] == [0.0] * 4


@pytest.mark.parametrize(
    "options", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}, {"bf16": True}], ids=str
)
def test_a_trainer_projects_after_each_step(tmp_path: Path, options: Any) -> None:
    model, watch = model_of(), Watch()
    base = training.base_of(model)
    trainer, callback = make(tmp_path, model, method(**EPSILON), learning_rate=1.0, weight_decay=0.1, **options)
    trainer.callback_handler.callbacks.insert(0, watch)  # before ours has its turn
    trainer.train()
    assert len(watch.longest) == 4
    assert all(0.9 < length <= 1.0 for length in watch.longest[1:])
    assert training.equal(training.base_of(model), base)
    assert callback.report is not None


def test_case_6_gradient_accumulation_equals_one_batch(tmp_path: Path) -> None:
    """Four micro-batches of labels of different lengths; PEFT's gradient is four times too large."""
    found = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer, callback = make(
            tmp_path, model_of(), method(), optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
            **options,
        )  # fmt: skip
        trainer.train()
        prompt = callback.soft_prompt
        assert prompt is not None
        found.append((prompt.encoder.delta.detach().clone(), training.losses(trainer)))
    for delta, losses in found[1:]:
        torch.testing.assert_close(delta, found[0][0], rtol=1e-4, atol=1e-6)
        assert losses == pytest.approx(found[0][1], rel=1e-4)
    assert float(found[0][0].abs().max()) > 1e-3


@pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
def test_case_6_pefts_gradient_grows_with_accumulation(tmp_path: Path) -> None:
    """This shows that the test above can fail."""
    import peft

    moved = []
    for size, steps in ((8, 1), (2, 4)):
        config = peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=list(contexts.IDS),
            cpt_tokens_type_mask=list(TYPES),
            cpt_mask=[1] * contexts.P,
        )
        with peers.quiet():
            wrapped = peft.get_peft_model(model_of(), config)
            arguments = {
                **training.QUIET, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 1, "warmup_steps": 0,
                "per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "lr_scheduler_type": "constant",
            }  # fmt: skip
            trainer = tf.Trainer(
                wrapped, tf.TrainingArguments(str(tmp_path), **arguments), train_dataset=data(), data_collator=collate
            )
            trainer.remove_callback(tf.PrinterCallback)
            trainer.train()
        moved.append(wrapped.prompt_encoder["default"].delta_embedding.weight.detach().norm())
    assert float(moved[1] / moved[0]) == pytest.approx(4.0, rel=0.2)


@pytest.mark.slow
def test_two_processes_equal_one_batch(tmp_path: Path) -> None:
    """Their losses are scaled by the Trainer, with the label tokens of all of them."""
    first, second = results(tmp_path, SCRIPTS / "cpt.py", tmp_path)
    assert torch.equal(first["delta"], second["delta"])
    trainer, callback = make(
        tmp_path, model_of(), method(), optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
        per_device_train_batch_size=8, max_steps=3,
    )  # fmt: skip
    trainer.train()
    assert callback.soft_prompt is not None
    torch.testing.assert_close(first["delta"], callback.soft_prompt.encoder.delta.detach(), rtol=1e-4, atol=1e-6)


def test_the_trainer_brings_the_column_of_examples(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    model = model_of()
    rows = [{**row, "example_ids": number % 4 - 1, "text": "unused"} for number, row in enumerate(data())]
    trainer, callback = make(tmp_path, model, method(leave_one_out=True), rows=rows, max_steps=2)
    assert callback.soft_prompt is not None
    encoder = callback.soft_prompt.encoder
    original = encoder.hidden_tokens
    encoder.hidden_tokens = lambda given, batch: (seen.append(given.get("example_ids")), original(given, batch))[1]
    trainer.train()
    trainer.evaluate()
    given = [own for own in seen if own is not None]
    assert given
    assert all(own.shape == (4,) and int(own.min()) >= -1 for own in given)
    without, _ = make(tmp_path, model_of(), method(leave_one_out=True), max_steps=2)
    with pytest.raises(UnsupportedModeError, match="example_ids"):
        without.train()


def test_a_loss_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path / "a", model_of(), method(), label_smoothing_factor=0.1)
    with pytest.raises(TrainerError, match=r"label_smoothing_factor=0\.1 .*context_aware_prompt_tuning"):
        trainer.train()
    trainer, _ = make(
        tmp_path / "b", model_of(), method(), given={"compute_loss_func": lambda output, labels, **_: output[0]}
    )
    with pytest.raises(UnsupportedModeError, match="compute_loss_func"):
        trainer.train()
    trainer, _ = make(tmp_path / "c", model_of(), method(context_loss=False), label_smoothing_factor=0.1)
    trainer.train()
    assert len(training.losses(trainer)) == 4


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, "learning_rate": 1.0}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_case_5_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path, optim: str) -> None:
    """PEFT loads words and deltas as words, and keeps the deltas; here the deltas alone are in the live file, bit for bit."""
    keeper = Keeper()
    whole, _ = make(tmp_path, model_of(), method(**EPSILON), keeper, optim=optim, **SAVING)
    whole.train()
    resumed, callback = make(tmp_path, model_of(), method(**EPSILON), optim=optim, **SAVING)
    training.spoil(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(training.trained(callback), keeper.kept[4][0])
    assert not training.equal(keeper.kept[2][0], keeper.kept[4][0])


def test_case_5_the_best_model_is_the_one_that_was_measured(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    keeper = Keeper()
    model = model_of()
    trainer, callback = make(tmp_path, model, method(epsilon_input=None), keeper, **{**SAVING, **best})
    trainer.train()
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert len(set(measured.values())) == 4
    first = min(measured, key=lambda step: measured[step])
    assert training.equal(training.trained(callback), keeper.kept[first][0])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[first], rel=1e-6)
    fresh = model_of()
    softhooks.load(fresh, tmp_path / f"checkpoint-{first}")
    batch = collate(data(4))
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, fresh(**batch).logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run")
    make(folder, model_of(), method(), **SAVING)[0].train()
    return folder


@pytest.mark.parametrize("change", ["another word", "the same examples, reversed"])
def test_a_run_goes_on_only_with_its_own_context(trained: Path, change: str) -> None:
    """Deltas belong to the places of their words: in another order they would change other words."""
    ids = [*contexts.IDS[:-1], 31]
    if change == "the same examples, reversed":
        ids = [contexts.IDS[0], *(contexts.IDS[place] for own in reversed(contexts.OWN) for place in own)]
        assert sorted(ids) == sorted(contexts.IDS)
    types = TYPES if change == "another word" else _reversed_types()
    other = ContextAwarePromptTuning(context_ids=ids, token_types=types)
    resumed, _ = make(trained, model_of(), other, **SAVING)
    with pytest.raises(TrainerError, match="method"):
        resumed.train(resume_from_checkpoint=True)


def _reversed_types() -> list[int]:
    """The types of the examples in the other order, numbered from the first."""
    kinds = [[TYPES[place] for place in own] for own in reversed(contexts.OWN)]
    numbered = [[kind and 4 * number + (kind - 1) % 4 + 1 for kind in own] for number, own in enumerate(kinds)]
    return [0, *(kind for own in numbered for kind in own)]


def test_a_loaded_prompt_is_taken_up_by_an_equal_callback(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), method()) as prompt:
        contexts.stirred(prompt, 0.001)
        prompt.save_pretrained(tmp_path / "prompt")
    model = model_of()
    loaded = softhooks.load(model, tmp_path / "prompt", trainable=True)
    before = loaded.encoder.delta.detach().clone()
    trainer, callback = make(tmp_path, model, method())
    trainer.train()
    assert callback.soft_prompt is loaded
    assert not torch.equal(loaded.encoder.delta, before)
    assert loaded.verify_frozen().tensors > 0


def test_a_folded_prompt_is_not_taken_up(tmp_path: Path) -> None:
    """Its labels would be changed too."""
    with softhooks.attach(zoo.build("llama"), method()) as prompt:
        prompt.save_pretrained(tmp_path / "prompt")
    model = model_of()
    loaded = softhooks.load(model, tmp_path / "prompt")
    before = loaded.encoder("embeddings").clone()
    with pytest.raises(TrainerError, match="trainable=True"):
        make(tmp_path, model, method())
    assert torch.equal(loaded.encoder("embeddings"), before)


def test_the_decorator(tmp_path: Path) -> None:
    rows, labels = ragged()
    batch, model = padded(rows, labels), model_of()

    @softhooks.tune(method(**EPSILON), save_to=tmp_path)
    def train(model: Any, soft_prompt: Any) -> list[float]:
        optimizer = torch.optim.AdamW(soft_prompt.parameters(), lr=1e-2)
        losses = []
        model.train()
        for _ in range(6):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    losses = train(model)
    assert losses[-1] < losses[0]
    assert not hasattr(model, "soft_prompt")
    assert softhooks.load(model, tmp_path).method == method(**EPSILON)


def test_a_loss_of_evaluation_is_read_but_not_trained_on() -> None:
    """`from_pretrained` returns a model in evaluation mode, in which CPT's loss is not computed: training so must be an error."""
    batch, model = padded(*ragged()), model_of()
    with softhooks.attach(model, method(**EPSILON)) as prompt:
        model.eval()
        loss = model(**batch).loss
        with torch.no_grad():
            assert torch.equal(loss, model(**batch).loss)
        with pytest.raises(TrainerError, match=r"model\.train\(\)"):
            loss.backward()
        assert all(parameter.grad is None for parameter in prompt.parameters())
        with pytest.raises(TrainerError, match="context_aware_prompt_tuning"):
            model(**batch, return_dict=False)[0].backward()
        model.train()
        model(**batch).loss.backward()
        assert any(parameter.grad is not None for parameter in prompt.parameters())


def test_examples_and_rows_of_a_template_in_a_trainer(tmp_path: Path) -> None:
    """From texts to a trained prompt with transformers' own collator, and to generation, without handling ids."""
    tokenizer = tokens.tokenizer()
    tokenizer.padding_side = "left"
    examples = [{"input": "word5 word6", "label": "word7"}, {"input": "word8", "label": "word9 word10"}]
    own = ContextAwarePromptTuning(
        examples=examples, template="word20 {input}{sep}word21 {label}", tokenizer=tokenizer, separator="word30",
        inner_separator="word31", leave_one_out=True, epsilon_input=8.0, epsilon_format=8.0,
    )  # fmt: skip
    rows = [own.render(example) for example in examples]
    assert [row["example_ids"] for row in rows] == [0, 1]
    model = naive.endless(model_of())
    callback = SoftPromptCallback(own)
    arguments = {**training.QUIET, "max_steps": 30, "learning_rate": 1e-1, "weight_decay": 0.1}
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(str(tmp_path), **arguments),
        train_dataset=rows,
        data_collator=tf.DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback],
    )
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    losses = training.losses(trainer)
    assert losses[-1] < 0.75 * losses[0]
    texts = [own.render(example["input"]) for example in examples]
    batch = tokenizer.pad(texts, return_tensors="pt")
    found = model.eval().generate(**batch, max_new_tokens=2, do_sample=False)
    assert found.shape == (2, batch["input_ids"].shape[1] + 2)


# --- it learns --------------------------------------------------------------------------------------------------------


@cache
def toy() -> Any:
    """A frozen model that knows nine tasks by name, in texts without the name."""
    return few_shot.pretrained(seed=0, steps=300)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["loop", "Trainer"])
@pytest.mark.parametrize("task", [0, 4, 8])
def test_a_context_learns_which_task_is_meant(tmp_path: Path, task: int, way: str) -> None:
    """Training on four examples only: in-context learning fails on unseen rows, and CPT solves them."""

    def with_trainer(model: Any, prompt: Any, batch: Any) -> float:
        rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
        arguments = {**training.QUIET, "max_steps": 60, "learning_rate": 1e-1, "lr_scheduler_type": "constant"}
        trainer = tf.Trainer(
            model, tf.TrainingArguments(str(tmp_path), **arguments), train_dataset=rows,
            callbacks=[SoftPromptCallback(prompt.method)],
        )  # fmt: skip
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
        return training.losses(trainer)[-1]

    outcome = few_shot.adapt(
        toy(), task, 60, shots=4, rate=1e-1, train=with_trainer if way == "Trainer" else None, **few_shot.BOUNDS
    )
    assert outcome["untrained"] < 0.5
    assert outcome["accuracy"] > 0.9
    assert outcome["loss"] < 0.1

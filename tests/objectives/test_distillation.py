"""Distillation: the loss by hand, zero between equal models, independent of micro-batches, with one model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import training
import transformers as tf
import zoo
from torch import Tensor, nn
from torch.nn import functional
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    CheckpointError,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    UnsupportedModeError,
)

P, H, K = 3, 32, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CASES = [
    zoo.Case("llama", "causal"),
    zoo.Case("gpt2", "causal"),
    zoo.Case("opt", "causal"),
    zoo.Case("gptj", "causal"),
    zoo.Case("gpt2", "sequence"),
    zoo.Case("bert", "tokens"),
    zoo.Case("roberta", "masked"),
    zoo.Case("t5", "seq2seq"),
    zoo.Case("bart", "seq2seq"),
    zoo.Case("bart", "sequence"),
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def tables(width: int = H) -> Tensor:
    return torch.randn(K, P, width, generator=torch.Generator().manual_seed(4)) * 0.5


def method(teachers: Any = None, **options: Any) -> MultitaskPromptTuning:
    return MultitaskPromptTuning(P, tasks=K, teachers=list(tables()) if teachers is None else teachers, **options)


def batch(case: zoo.Case, rows: int = 4) -> dict[str, Tensor]:
    """Ragged rows of several tasks; the labels are fewer than the text."""
    ids = zoo.text(rows, 7, seed=5, end=True)
    mask = torch.ones_like(ids)
    if not (case.arch == "bart" and case.head == "sequence"):
        mask[1, 5:] = 0
    labels = ids % 3 if case.head == "tokens" else ids.clone()
    labels[mask == 0] = -100
    labels[:, :2] = -100
    if case.head == "seq2seq":
        labels = zoo.text(rows, 4, seed=6)
        labels[2, 2:] = -100
    if case.head == "sequence":
        labels = torch.arange(rows) % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_ids": torch.arange(rows) % K}


def trained(case: zoo.Case, given: Any = None) -> tuple[Any, Any]:
    model = naive.without_dropout(zoo.build(case.arch, case.head)).train()
    prompt = softhooks.attach(model, given or method(list(tables(_width(case)))))
    return model, prompt


def _width(case: zoo.Case) -> int:
    return 16 if case.arch == "opt" else H


def vanilla(model: Any, prompt: Any, call: dict[str, Tensor], rows: Tensor) -> list[Any]:
    """The outputs of the whole batch with each task's prompt, as prompt tuning."""
    outputs = []
    for task in range(K):
        own = softhooks.attach(model, PromptTuning(P, init="tensor", init_tensor=rows[task]), "vanilla")
        own.heads.load_state_dict(prompt.heads.state_dict())
        outputs.append(model(**call, output_hidden_states=True))
        own.remove()
    softhooks.activate(model, "default")
    return outputs


def pick(outputs: list[Any], tasks: Tensor, take: Any) -> Tensor:
    """Each row as its own task's teacher has it."""
    return torch.stack([take(outputs[int(task)])[row] for row, task in enumerate(tasks)]).detach()


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_that_of_the_paper(case: zoo.Case) -> None:
    """L + 0.9 (KL(teacher || student) + MSE of hidden states), by hand from plain forwards of the same prompts."""
    model, prompt = trained(case)
    call = batch(case)
    loss = model(**call).loss
    gradients = torch.autograd.grad(loss, list(prompt.encoder.parameters()))
    student = softhooks.attach(model, MultitaskPromptTuning(P, tasks=K), "student")
    student.encoder.load_state_dict(prompt.encoder.state_dict(), strict=False)
    student.heads.load_state_dict(prompt.heads.state_dict())
    own = model(**call, output_hidden_states=True)
    tasks, labels = call.pop("task_ids"), call["labels"]
    teachers = vanilla(model, prompt, call, tables(_width(case)))

    shown = labels if case.head != "causal" else torch.cat([labels[:, 1:], torch.full((4, 1), -100)], 1)
    shown = shown != -100
    share = shown.reshape(4, -1).sum(-1) / shown.sum()
    chance = pick(teachers, tasks, lambda output: output.logits).softmax(-1)
    apart = (chance * (chance.log() - own.logits.softmax(-1).log())).sum(-1)
    divergence = (apart * shown).sum() / shown.sum()

    def hidden(take: Any, columns: Tensor) -> Tensor:
        difference = pick(teachers, tasks, take) - take(own)
        return sum((difference[row][columns[row]] ** 2).mean() * share[row] for row in range(4))

    text = call["attention_mask"].bool()
    if case.is_seq2seq:
        distance = hidden(lambda output: output.encoder_last_hidden_state, text)
        if case.head == "seq2seq":
            distance = (distance + hidden(lambda output: output.decoder_hidden_states[-1], shown)) / 2
    else:
        distance = hidden(lambda output: output.hidden_states[-1], text)
    plain = functional.cross_entropy(own.logits[shown], _targets(case, labels)[shown])
    expected = plain + 0.9 * (divergence + distance)
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert divergence.item() > 1e-3
    assert distance.item() > 1e-3
    theirs = torch.autograd.grad(expected, list(student.encoder.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for one, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)


def _targets(case: zoo.Case, labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], labels[:, :1]], 1) if case.head == "causal" else labels


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kl_and_mse_are_exactly_nothing_when_the_student_is_the_teacher(case: zoo.Case) -> None:
    losses = []
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        model, prompt = trained(case, method(list(tables(_width(case))), distillation=weight))
        with torch.no_grad():
            prompt.encoder.left.zero_()
            prompt.encoder.right.zero_()
            prompt.encoder.teachers.copy_(prompt.encoder.shared.expand(K, -1, -1))
        call = batch(case)
        loss = model(**call).loss
        losses.append(loss.detach())
        if weight:
            loss.backward()
            softhooks.activate(model, "default")
            assert all(bool(parameter.grad.isfinite().all()) for parameter in prompt.parameters())
    assert torch.equal(losses[0], losses[1])


def test_what_is_masked_is_not_compared() -> None:
    """Neither padding nor logits without a label."""
    case = zoo.Case("llama", "causal")
    model, _ = trained(case)
    call = batch(case)
    expected = model(**call).loss
    call["input_ids"] = call["input_ids"].clone()
    call["input_ids"][1, 5:] = 17
    torch.testing.assert_close(model(**call).loss, expected, **CLOSE)
    call["labels"] = call["labels"].clone()
    call["labels"][0, 3] = -100
    assert not torch.allclose(model(**call).loss, expected, **CLOSE)


def test_no_gradient_reaches_the_teachers_and_nothing_is_copied() -> None:
    case = zoo.Case("llama", "causal")
    model, prompt = trained(case)
    sizes = sum(parameter.numel() for parameter in model.parameters())
    model(**batch(case)).loss.backward()
    assert not prompt.encoder.teachers.requires_grad
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes
    assert sum(buffer.numel() for buffer in prompt.encoder.buffers()) == K * P * H + 1
    assert {name for name, _ in prompt.encoder.named_parameters()} == {"shared", "left", "right"}
    prompt.verify_frozen()


def test_the_teacher_is_at_rest_and_leaves_the_random_state_alone() -> None:
    """With dropout the student's forward draws the numbers that it would draw without a teacher."""
    model, call = zoo.build("gpt2"), batch(zoo.Case("gpt2", "causal"))
    seen = []
    for teachers in (None, list(tables())):
        torch.manual_seed(0)
        prompt = softhooks.attach(model, MultitaskPromptTuning(P, tasks=K, teachers=teachers))
        model.train()
        torch.manual_seed(3)
        seen.append(model(**call).logits)
        assert all(module.training for module in model.modules())
        prompt.remove()
    assert torch.equal(*seen)


def test_without_gradients_or_in_evaluation_there_is_no_teacher() -> None:
    case = zoo.Case("llama", "causal")
    model, prompt = trained(case)
    call = batch(case)
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**call)
    calls.clear()
    model.eval()
    evaluated = model(**call).loss
    assert len(calls) == 2, "the virtual tokens, and the text"
    model.train()
    calls.clear()
    assert model(**call).loss.item() > evaluated.item()
    assert len(calls) == 4
    prompt.fold()
    torch.testing.assert_close(model(**call).loss, evaluated, **CLOSE)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"return_dict": False}], ids=str)
def test_the_output_keeps_its_shape(case: zoo.Case, options: dict[str, Any]) -> None:
    call = batch(case)
    shapes = []
    for teachers in ([], None):
        given = MultitaskPromptTuning(P, tasks=K) if teachers == [] else None
        torch.manual_seed(0)
        model, prompt = trained(case, given)
        kept = {key: value.clone() for key, value in call.items()}
        output = model(**call, **options)
        assert all(torch.equal(call[key], kept[key]) for key in kept)
        named = dict(output.items()) if isinstance(output, tf.utils.ModelOutput) else {}
        shapes.append((list(named), naive.shapes(tuple(named.values()) if named else output)))
        prompt.remove()
    assert shapes[0] == shapes[1]


def test_a_config_that_asks_for_hidden_states_gets_them() -> None:
    case = zoo.Case("llama", "causal")
    model, _ = trained(case)
    model.config.output_hidden_states = True
    assert len(model(**batch(case)).hidden_states) == 3


# --- however the batch is cut -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.arch not in ("bert", "roberta")], ids=str)
def test_what_teachers_add_accumulates_to_that_of_the_large_batch(case: zoo.Case) -> None:
    """With `num_items_in_batch`, as the Trainer passes it; rows have different lengths and numbers of labels."""
    model, prompt = trained(case)
    parameters = list(prompt.encoder.parameters())
    call = batch(case)
    labels = call["labels"][:, 1:] if case.head == "causal" else call["labels"]
    count = (labels != -100).sum()

    def added(rows: slice, **options: Any) -> list[Tensor]:
        part = {key: value[rows] for key, value in call.items()}
        losses = []
        for prompt.objective.weight in (0.9, 0.0):
            losses.append(model(**part, **options).loss)
        return [(losses[0] - losses[1]).detach(), *torch.autograd.grad(losses[0] - losses[1], parameters)]

    whole = added(slice(None))
    parts = [added(rows, num_items_in_batch=count) for rows in (slice(0, 1), slice(1, 4))]
    for expected, *each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(each), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_trainer_accumulates_what_a_large_batch_gives(tmp_path: Path) -> None:
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        model = naive.without_dropout(zoo.build("llama"))
        trainer, callback = training.prompted(
            tmp_path, model, "causal", method(sampling=None), max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.5, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train_dataset = ragged()
        trainer.train()
        ends.append(training.trained(callback))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)


def ragged() -> list[dict[str, Tensor]]:
    rows = training.rows("causal")
    for number, row in enumerate(rows):
        row["task_ids"] = torch.tensor(number % K)
        row["labels"][: number % 5] = -100
        row["attention_mask"][6 - number % 3 :] = 0
        row["labels"][6 - number % 3 :] = -100
    return rows


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_under_bf16_autocast(case: zoo.Case) -> None:
    model, prompt = trained(case)
    call = batch(case)
    exact = model(**call).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**call).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0.05)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in prompt.parameters())


def test_a_trainer_in_bf16(tmp_path: Path) -> None:
    ends = []
    for bf16 in (False, True):
        trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", method(), bf16=bf16)
        trainer.train_dataset = ragged()
        trainer.train()
        ends.append(training.losses(trainer))
    torch.testing.assert_close(torch.tensor(ends[0]), torch.tensor(ends[1]), rtol=0.05, atol=0.05)


def test_with_activation_checkpointing() -> None:
    case = zoo.Case("llama", "causal")
    model, prompt = trained(case)
    call = batch(case)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**call).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in prompt.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- what cannot be right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": torch.ones(4, 1, 7, 7)}, "attention mask"),
        ({"labels": torch.rand(4, 7)}, "labels"),
        ({"past_key_values": tf.DynamicCache()}, "past_key_values"),
        ({"labels": None}, "labels"),
    ],
    ids=["mask", "labels", "cache", "none"],
)
def test_a_call_that_cannot_be_taught_is_refused(change: dict[str, Any], words: str) -> None:
    case = zoo.Case("llama", "causal")
    model, _ = trained(case)
    with pytest.raises(UnsupportedModeError, match=words):
        model(**{**batch(case), **change})
    assert model(**batch(case)).loss.isfinite()


@pytest.mark.parametrize("labels", [torch.rand(4), torch.rand(4, 3)], ids=["regression", "several labels"])
def test_labels_that_are_no_classes_are_refused(labels: Tensor) -> None:
    case = zoo.Case("gpt2", "sequence")
    model, _ = trained(case)
    with pytest.raises(UnsupportedModeError, match="labels"):
        model(**{**batch(case), "labels": labels})


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("number", [K, 2 * K - 1, 2 * K, -1, -K])
def test_a_number_beyond_the_tasks_is_no_teacher(number: int, mode: bool) -> None:
    case = zoo.Case("llama", "causal")
    model, _ = trained(case)
    call = {**batch(case), "task_ids": torch.tensor([0, 1, number, 2])}
    with pytest.raises(UnsupportedModeError, match=f"task ids: +{number}\n"):
        model.train(mode)(**call)


# --- given teachers ---------------------------------------------------------------------------------------------------


def test_teachers_may_be_saved_prompts_by_name(tmp_path: Path) -> None:
    model = zoo.build("llama")
    rows = tables()
    for task, name in enumerate("abc"):
        with softhooks.attach(model, PromptTuning(P, init="tensor", init_tensor=rows[task])) as prompt:
            prompt.save_pretrained(tmp_path / name, as_peft=task == 2)
    teachers = {"c": str(tmp_path / "c"), "a": tmp_path / "a", "b": rows[1]}
    given = MultitaskPromptTuning(P, tasks=["a", "b", "c"], teachers=teachers)
    with softhooks.attach(model, given) as prompt:
        assert torch.equal(prompt.encoder.teachers, rows)


def test_a_tasks_saved_prompt_may_teach(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, MultitaskPromptTuning(P, tasks=1)) as prompt:
        prompt.save_pretrained(tmp_path)
        rows = prompt.encoder("embeddings").detach()
    with softhooks.attach(model, method(teachers=[tmp_path] * K)) as prompt:
        assert torch.equal(prompt.encoder.teachers[1], rows)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PromptTuning(P + 1), PromptMismatchError, r"\[4, 32\]"),
        (lambda: PromptTuning(P, placement="after_first"), CheckpointError, "after_first"),
        (lambda: PrefixTuning(P), CheckpointError, "prefix_tuning"),
        (lambda: MultitaskPromptTuning(P, tasks=2), CheckpointError, "several tasks"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, make: Any, error: type[Exception], words: str) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, make()) as prompt:
        prompt.save_pretrained(tmp_path)
    with untouched(model), pytest.raises(error, match=words):
        softhooks.attach(model, method(teachers=[tmp_path] * K))


def test_a_teacher_with_a_head_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama", "sequence"), PromptTuning(P)) as prompt:
        prompt.save_pretrained(tmp_path / "head")
    with softhooks.attach(zoo.build("bert", "masked"), PromptTuning(P)) as prompt:
        prompt.save_pretrained(tmp_path / "bert")
    model = zoo.build("llama")
    with untouched(model):
        with pytest.raises(CheckpointError, match="score"):
            softhooks.attach(model, method(teachers=[tmp_path / "head"] * K))
        with pytest.raises(PromptMismatchError, match="causal"):
            softhooks.attach(model, method(teachers=[tmp_path / "bert"] * K))
        with pytest.raises(CheckpointError, match="nowhere"):
            softhooks.attach(model, method(teachers=[tmp_path / "nowhere"] * K))


# --- teachers that are trained ----------------------------------------------------------------------------------------


def learning(steps: int = 3, **options: Any) -> MultitaskPromptTuning:
    return method(teachers="train", teacher_steps=steps, **options)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_first_the_teachers_train_and_then_the_decomposition(name: str, to_none: bool) -> None:
    """The teachers equal those of plain prompt tuning bit for bit, and stay unchanged once they teach."""
    case = zoo.Case("llama", "causal")
    model, prompt = trained(case, learning())
    encoder, call = prompt.encoder, batch(case)
    kind = getattr(torch.optim, name)
    rows = nn.Parameter(encoder.vanilla.detach().clone())
    start = {key: value.detach().clone() for key, value in encoder.named_parameters()}
    optimizer, plain = kind(prompt.parameters(), lr=0.05, weight_decay=0.1), kind([rows], lr=0.05, weight_decay=0.1)
    taught = None
    for step in range(6):
        assert encoder.trains_teachers == (step < 3)
        model(**call).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        moved = {key for key, value in encoder.named_parameters() if not torch.equal(value, start[key])}
        if step < 3:
            assert moved == {"vanilla"}
            rows.grad = gradient_of(model, call, rows)
            plain.step()
        if step == 2:
            taught = encoder.teachers.clone()
            torch.testing.assert_close(taught, rows.detach(), rtol=1e-4, atol=1e-5)
    assert moved == {"vanilla", "shared", "left", "right"}
    assert torch.equal(encoder.teachers, taught)
    prompt.verify_frozen()


def gradient_of(model: Any, call: dict[str, Tensor], rows: Tensor) -> Tensor:
    """The gradients of vanilla prompts of the tasks from the model's own loss."""
    with softhooks.disabled(model):
        embedded = torch.cat([rows[call["task_ids"]], model.get_input_embeddings()(call["input_ids"])], 1)
        mask = torch.cat([torch.ones(4, P).long(), call["attention_mask"]], 1)
        logits = model(inputs_embeds=embedded, attention_mask=mask).logits[:, P:-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), call["labels"][:, 1:].flatten())
    return torch.autograd.grad(loss, rows)[0]


def test_evaluation_sees_the_decomposition_while_the_teachers_train() -> None:
    case = zoo.Case("llama", "causal")
    model, prompt = trained(case, learning())
    call = batch(case)
    student = model.eval()(**call).loss
    expected = model.train()(**call).loss
    assert not torch.allclose(student, expected)
    model(**call).loss.backward()
    torch.optim.SGD(prompt.parameters(), lr=1.0).step()
    assert torch.equal(model.eval()(**call).loss, student)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_that_is_killed_between_teachers_and_students_resumes_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """While the teachers train, at the step that makes them teachers, and after; steps of two batches each."""
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": stop, "max_steps": 7, "weight_decay": 0.1, "warmup_steps": 2,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    ends = []
    for resume in (None, str(tmp_path / f"checkpoint-{stop}")):
        trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", learning(3), **options)
        trainer.train_dataset = ragged()
        trainer.train(resume_from_checkpoint=resume)
        encoder = callback.soft_prompt.encoder
        assert int(encoder.taken) == 3
        buffers = {name: value.clone() for name, value in encoder.named_buffers()}
        ends.append((training.losses(trainer), training.trained(callback), buffers))
    assert len(ends[0][0]) == 7
    assert training.equal(*ends)


def test_steps_are_counted_once_with_an_optimizer_of_any_kind(tmp_path: Path) -> None:
    class Foreign(torch.optim.SGD):
        """An optimizer whose steps do not run torch's hooks, as in some libraries."""

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.sub_(parameter.grad, alpha=group["lr"])

    for optimizer in (torch.optim.SGD, Foreign):
        model = zoo.build("llama")
        made = optimizer(model.parameters(), lr=0.01)
        if optimizer is Foreign:
            made.step = Foreign.step.__get__(made)  # past the wrapper that torch puts around a subclass's step
        trainer, callback = training.prompted(
            tmp_path, model, "causal", learning(3), given={"optimizers": (made, None)}, max_steps=2
        )
        trainer.train_dataset = ragged()
        trainer.train()
        assert int(callback.soft_prompt.encoder.taken) == 2


def test_trained_teachers_are_not_saved_with_the_prompt(tmp_path: Path) -> None:
    model, prompt = trained(zoo.Case("llama", "causal"), learning())
    prompt.save_pretrained(tmp_path)
    prompt.remove()
    loaded = softhooks.load(model, tmp_path)
    assert {name for name, _ in loaded.encoder.named_parameters()} == {"shared", "left", "right"}
    assert loaded.objective is None
    assert loaded.method.teachers is None

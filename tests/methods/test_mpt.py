"""Multitask prompt tuning: the prompt of a task, its choice per row, training and saving."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import oracles
import pytest
import torch
import training
import zoo
from safetensors.torch import load_file
from torch import Tensor
from untouched import remove_all, same_bits, untouched

import softhooks
from softhooks import (
    CheckpointError,
    MultitaskPromptTuning,
    OptionError,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    TrainerError,
    UnsupportedModeError,
)
from softhooks.formats.softhooks_files import TENSORS

P, H, K = 3, 32, 3
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
IDS = torch.tensor([0, 2, 1, 2])


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def method(**options: Any) -> MultitaskPromptTuning:
    return MultitaskPromptTuning(P, **{"tasks": K, **options})


@torch.no_grad()
def stir(prompt: Any, by: float = 0.3) -> None:
    for parameter in prompt.encoder.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=by)


def by_hand(encoder: Any, task: int) -> Tensor:
    """P* o (u v^T), from the parameters alone."""
    rank = encoder.left.shape[-1]
    start = torch.tensor([1.0] + [0.0] * (rank - 1))
    left, right = start + encoder.rate * encoder.left[task], start + encoder.rate * encoder.right[task]
    return encoder.shared * (left @ right.T)


def prompt_of(prompt: Any, task: int) -> Tensor:
    return prompt.encoder("embeddings", task).detach()


# --- what a task's prompt is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_tasks_prompt_is_the_shared_one_times_a_matrix_of_low_rank(rank: int) -> None:
    with softhooks.attach(zoo.build("llama"), MultitaskPromptTuning(8, tasks=2, rank=rank)) as prompt:
        stir(prompt)
        encoder = prompt.encoder
        for task in range(2):
            rows = prompt_of(prompt, task)
            torch.testing.assert_close(rows, by_hand(encoder, task), rtol=1e-5, atol=1e-6)
            ratio = (rows / encoder.shared).double()
            values = torch.linalg.svdvals(ratio)
            assert int((values > 1e-4 * values[0]).sum()) == rank
        assert not torch.allclose(prompt_of(prompt, 0), prompt_of(prompt, 1), atol=0.1)


@pytest.mark.parametrize("rank", [1, 3])
def test_at_the_start_every_task_has_about_the_shared_prompt(rank: int) -> None:
    """The product is around one, not around zero, as it would be with u and v drawn around 0."""
    with softhooks.attach(zoo.build("llama"), method(rank=rank)) as prompt:
        shared = prompt.encoder.shared.detach()
        words = zoo.build("llama").get_input_embeddings().weight
        assert all(bool((row == words).all(-1).any()) for row in shared), "words of the vocabulary"
        for task in range(K):
            ratio = prompt_of(prompt, task) / shared
            assert float((ratio - 1).abs().mean()) < 0.05
            assert float((ratio - 1).abs().max()) > 0, "with a little noise"


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_weight_decay_pulls_u_and_v_to_one(name: str, rank: int) -> None:
    with softhooks.attach(zoo.build("llama"), method(rank=rank)) as prompt:
        stir(prompt)
        encoder = prompt.encoder
        optimizer = getattr(torch.optim, name)([encoder.left, encoder.right], lr=0.1, weight_decay=0.9)
        for _ in range(400):
            encoder.left.grad, encoder.right.grad = torch.zeros_like(encoder.left), torch.zeros_like(encoder.right)
            optimizer.step()
        for task in range(K):
            torch.testing.assert_close(prompt_of(prompt, task), encoder.shared.detach())


@pytest.mark.parametrize("ratio", [0.4 / 0.3, 3.0])
def test_a_task_rate_is_a_learning_rate_of_its_own(ratio: float) -> None:
    """One group of Adam with the rate in the encoder moves as two groups do with their own learning rates."""
    ids, ends = zoo.text(4, 6), []
    for rate in (ratio, 1.0):
        torch.manual_seed(0)
        model = zoo.build("llama").double()
        prompt = softhooks.attach(model, method(task_rate=rate))
        encoder = prompt.encoder.double()
        groups = [{"params": [encoder.shared], "lr": 0.03}, {"params": [encoder.left, encoder.right]}]
        optimizer = torch.optim.Adam(groups, lr=0.03 if rate == ratio else 0.03 * ratio, eps=1e-30)
        for _ in range(5):
            model(ids, labels=ids, task_ids=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([prompt_of(prompt, task) for task in range(K)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ends[0][0], ends[0][1], atol=1e-3)


def test_further_ranks_leave_zero() -> None:
    model, ids = zoo.build("llama"), zoo.text(4, 6)
    with softhooks.attach(model, method(rank=2)) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.05)
        for _ in range(3):
            model(ids, labels=ids, task_ids=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ratio = prompt_of(prompt, 0) / prompt.encoder.shared.detach()
        assert torch.linalg.svdvals(ratio)[1] > 1e-2


# --- who chooses ------------------------------------------------------------------------------------------------------


def run_alone(model: Any, prompt: Any, case: zoo.Case, call: dict[str, Tensor], row: int, task: int) -> Tensor:
    rows = prompt.encoder("embeddings", task)
    rest = {"decoder_input_ids": call["decoder_input_ids"][row][None]} if case.is_seq2seq else {}
    causal = case.arch not in (*zoo.ENCODERS, *zoo.SEQ2SEQ)
    with softhooks.disabled(model):
        return oracles.prompted(model, call["input_ids"][row][None], rows, "front", causal=causal, **rest)


CASES = [
    *[(zoo.Case(arch, "causal"), None) for arch in ("llama", "gpt2", "gemma3", "mixtral", "gptj", "bloom")],
    (zoo.Case("llama", "causal"), "slots"),
    (zoo.Case("bert", "tokens"), None),
    (zoo.Case("t5", "seq2seq"), None),
    (zoo.Case("bart", "seq2seq"), None),
]


@pytest.mark.parametrize(("case", "injection"), CASES, ids=str)
def test_a_mixed_batch_equals_the_runs_task_by_task(case: zoo.Case, injection: Any) -> None:
    model, ids = zoo.build(case.arch, case.head), zoo.text(4, 6)
    call = zoo.inputs(case, ids)
    with softhooks.attach(model, method(), injection=injection) as prompt:
        stir(prompt)
        mixed = model(**call, task_ids=IDS).logits
        expected = torch.cat([run_alone(model, prompt, case, call, row, int(task)) for row, task in enumerate(IDS)])
        torch.testing.assert_close(mixed, expected, **CLOSE)
        parameters = list(prompt.encoder.parameters())
        ours = torch.autograd.grad(mixed.square().sum(), parameters)
        theirs = torch.autograd.grad(expected.square().sum(), parameters)
        largest = max(float(gradient.abs().max()) for gradient in theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)
        for task in range(K):
            alone = model(**call, task_ids=torch.full((4,), task)).logits
            torch.testing.assert_close(alone[task == IDS], mixed[task == IDS], **CLOSE)


@pytest.mark.parametrize(("case", "injection"), CASES, ids=str)
def test_a_batch_of_one_task_gives_the_others_no_gradient(case: zoo.Case, injection: Any) -> None:
    model, call = zoo.build(case.arch, case.head), zoo.inputs(case, zoo.text(2, 6))
    with softhooks.attach(model, method(), injection=injection) as prompt:
        model(**call, task_ids=torch.tensor([1, 1])).logits.square().sum().backward()
        encoder = prompt.encoder
        for gradient in (encoder.left.grad, encoder.right.grad):
            assert bool((gradient[[0, 2]] == 0).all())
            assert bool((gradient[1] != 0).any())
        assert bool((encoder.shared.grad != 0).any())


def test_each_task_of_a_batch_is_computed_once() -> None:
    model = zoo.build("llama")
    lengths: list[tuple[int, ...]] = []
    with softhooks.attach(model, method()) as prompt:
        assert prompt.injection == "shared"
        model.model.layers[0].register_forward_hook(lambda _m, _a, output: lengths.append(tuple(output.shape)))
        model(zoo.text(6, 5), task_ids=torch.tensor([2, 2, 0, 2, 0, 2]))
    assert lengths == [(2, P, H), (6, 5, H)]


def test_several_tasks_without_task_ids_is_an_error_that_names_them() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 5)
    with softhooks.attach(model, method(tasks=["boolq", "rte"])), untouched(model):
        with pytest.raises(UnsupportedModeError, match=r"(?s)task_ids.*boolq, rte"):
            model(ids)
        with pytest.raises(UnsupportedModeError, match=r"(?s)task ids: +2.*0: boolq, 1: rte"):
            model(ids, task_ids=torch.tensor([0, 2]))
        with pytest.raises(UnsupportedModeError, match=r"task ids: +-1"):
            model(ids, task_ids=torch.tensor([-1, 0]))
        with pytest.raises(UnsupportedModeError, match=r"float32"):
            model(ids, task_ids=torch.tensor([0.0, 1.0]))
        with pytest.raises(UnsupportedModeError, match=r"3 values for a batch of 2 rows"):
            model(ids, task_ids=torch.tensor([0, 1, 1]))
        with pytest.raises(UnsupportedModeError, match=r"list"):
            model(ids, task_ids=[0, 1])
        model(ids, task_ids=torch.tensor([[0], [1]]))


@pytest.mark.parametrize("folded", [False, True])
def test_one_task_needs_no_task_ids(folded: bool) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 5)
    with softhooks.attach(model, method(tasks=["boolq"])) as prompt:
        if folded:
            prompt.fold()
        assert torch.equal(model(ids).logits, model(ids, task_ids=torch.tensor([0, 0])).logits)
        with pytest.raises(UnsupportedModeError, match="0: boolq"):
            model(ids, task_ids=torch.tensor([0, 1]))


def test_beside_other_prompts_in_rows() -> None:
    """Also next to a multitask prompt with more tasks: a row's task id applies to its own prompt only."""
    model, ids = zoo.build("llama"), zoo.text(4, 6)
    first = softhooks.attach(model, method(), "first")
    second = softhooks.attach(model, MultitaskPromptTuning(5, tasks=6), "second")
    softhooks.attach(model, PrefixTuning(2), "prefix")
    with torch.no_grad():
        stir(first)
        stir(second)
        expected = [
            run_alone(model, prompt, zoo.Case("llama", "causal"), {"input_ids": ids}, row, task)
            for row, (prompt, task) in enumerate([(first, 1), (second, 5)])
        ]
        softhooks.activate(model, "prefix")
        prefix = model(ids[2:3]).logits
        with softhooks.disabled(model):
            bare = model(ids[3:]).logits
        with softhooks.rows(model, ["first", "second", "prefix", None]):
            mixed = model(ids, task_ids=torch.tensor([1, 5, -100, -100])).logits
            with pytest.raises(UnsupportedModeError, match=r"task ids: +5"):
                model(ids, task_ids=torch.tensor([5, 5, 0, 0]))
    torch.testing.assert_close(mixed, torch.cat([*expected, prefix, bare]), **CLOSE)


# --- generation -------------------------------------------------------------------------------------------------------

ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 5)]
NEW = 5


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "gptj"])
def test_generation_of_a_mixed_batch(arch: str, folded: bool) -> None:
    model, bare, batch = naive.endless(zoo.build(arch)), zoo.build(arch), naive.left_padded(ROWS)
    tasks = [2, 0, 2]
    with torch.no_grad(), softhooks.attach(model, method()) as prompt:
        stir(prompt)
        if folded:
            prompt.fold()
        for options in ({}, {"use_cache": False}):
            found = model.generate(
                **batch, task_ids=torch.tensor(tasks), max_new_tokens=NEW, do_sample=False, **options
            )
            for ours, row, task in zip(found, ROWS, tasks, strict=True):
                step = naive.prompt_step(bare, prompt_of(prompt, task))
                assert torch.equal(ours[-len(row) - NEW :], naive.greedy(step, row, NEW))
        beams = model.generate(**batch, task_ids=torch.tensor(tasks), max_new_tokens=NEW, do_sample=False, num_beams=2)
        step = naive.prompt_step(bare, prompt_of(prompt, 2))
        assert torch.equal(beams[0][-len(ROWS[0]) - NEW :], naive.beam(step, ROWS[0], 2, NEW))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_case_9_generation_of_an_encoder_decoder_is_prompted_as_its_training(arch: str, folded: bool) -> None:
    """PEFT prompts the decoder in training and not in generation; here the prompt is the encoder's, in both."""
    case = zoo.Case(arch, "seq2seq")
    model, bare = naive.endless(zoo.build(arch, "seq2seq")), zoo.build(arch, "seq2seq")
    start = torch.tensor([model.config.decoder_start_token_id])
    ids, tasks = zoo.text(3, 6), torch.tensor([1, 0, 2])
    with softhooks.attach(model, method()) as prompt:
        stir(prompt)
        call = {"input_ids": ids, "decoder_input_ids": zoo.text(3, 4, seed=9)}
        logits = model(**call, task_ids=tasks).logits
        trained = torch.cat([run_alone(model, prompt, case, call, row, int(task)) for row, task in enumerate(tasks)])
        torch.testing.assert_close(logits, trained, **CLOSE)
        if folded:
            prompt.fold()
        steps = [naive.encoder_step(bare, row, prompt_of(prompt, int(t))) for row, t in zip(ids, tasks, strict=True)]
        for options in ({}, {"use_cache": False}):
            found = model.generate(ids, task_ids=tasks, max_new_tokens=NEW, do_sample=False, **options)
            for ours, step in zip(found, steps, strict=True):
                assert torch.equal(ours, naive.greedy(step, start, NEW))
        beams = model.generate(ids, task_ids=tasks, max_new_tokens=NEW, do_sample=False, num_beams=2)
        assert torch.equal(beams[0], naive.beam(steps[0], start, 2, NEW))
        with pytest.raises(UnsupportedModeError, match="task_ids"):
            model.generate(ids, max_new_tokens=NEW)
        seen: list[dict[str, Any]] = []
        keep = model.get_encoder().register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True
        )
        with softhooks.disabled(model):
            plain = model.generate(ids, task_ids=tasks, max_new_tokens=NEW, do_sample=False)
        keep.remove()
        assert seen
        assert all("task_ids" not in kwargs for kwargs in seen)
        assert torch.equal(plain, naive.endless(bare).generate(ids, max_new_tokens=NEW, do_sample=False))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": 0}, "tasks"),
        ({"tasks": True}, "tasks"),
        ({"tasks": []}, "tasks"),
        ({"tasks": "boolq"}, "tasks"),
        ({"tasks": ["a", "a"]}, "tasks"),
        ({"tasks": ["a", 1]}, "tasks"),
        ({"rank": 0}, "rank"),
        ({"rank": 1.0}, "rank"),
        ({"task_rate": 0.0}, "task_rate"),
        ({"distillation": -1.0}, "distillation"),
        ({"sampling": "square"}, "sampling"),
        ({"teachers": "learn"}, "'train'"),
        ({"teachers": "train"}, "teacher_steps"),
        ({"teachers": "train", "teacher_steps": 0}, "teacher_steps"),
        ({"teacher_steps": 5}, "teacher_steps"),
        ({"teachers": [torch.zeros(P, H)] * 2}, "one teacher for each task"),
        ({"teachers": {"0": torch.zeros(P, H)}}, "one teacher for each task"),
        ({"teachers": 3}, "teachers"),
        ({"source": "somewhere", "init": "random"}, "source"),
        ({"init": "text"}, "init_text"),
        ({"init": "words"}, "init"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MultitaskPromptTuning(**{"num_virtual_tokens": P, "tasks": K, **options})


def test_tasks_may_be_any_sequence_of_names() -> None:
    assert method(tasks=["a", "b"]) == method(tasks=("a", "b"))
    assert method(tasks=["a", "b"]).names == ("a", "b")
    assert method(tasks=2).names == ("0", "1")


@pytest.mark.parametrize("init", ["vocab", "random", "tensor"])
def test_other_starts(init: str) -> None:
    rows = torch.randn(P, H)
    options = {"init_tensor": rows} if init == "tensor" else {}
    with softhooks.attach(zoo.build("llama"), method(init=init, **options)) as prompt:
        shared = prompt.encoder.shared.detach()
    assert torch.equal(shared, rows) == (init == "tensor")
    assert bool((shared.abs() <= 0.5).all()) == (init == "random")


# --- saved ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model: Any, tasks: int = K) -> list[Tensor]:
    ids = zoo.text(2, 6)
    return [model.eval()(ids, task_ids=torch.full((2,), task)).logits for task in range(tasks)]


@pytest.mark.parametrize("rank", [1, 2])
def test_several_tasks_are_saved_as_they_are(tmp_path: Path, rank: int) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, method(tasks=["a", "b", "c"], rank=rank)) as prompt:
        stir(prompt)
        expected = answers(model)
        prompt.save_pretrained(tmp_path)
    held = load_file(tmp_path / TENSORS)
    assert {name: list(table.shape) for name, table in held.items()} == {
        "prompt.shared": [P, H], "prompt.left": [K * P, rank], "prompt.right": [K * H, rank],
    }  # fmt: skip
    loaded = softhooks.load(model, tmp_path)
    assert loaded.method.names == ("a", "b", "c")
    assert all(map(same_bits, answers(model), expected))
    with pytest.raises(UnsupportedModeError, match="a, b, c"):
        model(zoo.text(2, 6))
    loaded.remove()
    trainable = softhooks.load(model, tmp_path, trainable=True)
    for one, other in zip(answers(model), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert trainable.num_parameters == P * H + K * (P + H) * rank
    before = {name: parameter.detach().clone() for name, parameter in trainable.named_parameters()}
    optimizer = torch.optim.AdamW(trainable.parameters(), lr=0.1)
    model(zoo.text(4, 6), labels=zoo.text(4, 6), task_ids=IDS).loss.backward()
    optimizer.step()
    assert not [name for name, now in trainable.named_parameters() if torch.equal(now, before[name])]


def test_one_task_is_saved_as_one_matrix(tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method(tasks=1)) as prompt, torch.no_grad():
        stir(prompt)
        expected = model(ids).logits
        prompt.save_pretrained(tmp_path)
    held = load_file(tmp_path / TENSORS)
    assert {name: list(table.shape) for name, table in held.items()} == {"prompt.embeddings": [P, H]}
    for trainable in (False, True):
        with softhooks.load(model, tmp_path, trainable=trainable) as loaded, torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            assert loaded.num_parameters == (P * H + P + H if trainable else P * H)
    rows = held["prompt.embeddings"]
    with softhooks.attach(model, PromptTuning(P, init="tensor", init_tensor=rows)), torch.no_grad():
        assert torch.equal(model(ids).logits, expected), "and it is a prompt like any other"


@pytest.mark.parametrize("tensor", ["prompt.left", "prompt.right", "prompt.shared"])
def test_a_file_whose_tables_do_not_fit_each_other_is_refused(tmp_path: Path, tensor: str) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    model = zoo.build("llama")
    with softhooks.attach(model, method()) as prompt:
        prompt.save_pretrained(tmp_path)
    held = load_file(tmp_path / TENSORS)
    held[tensor] = held[tensor][1:].clone()
    with safe_open(tmp_path / TENSORS, "pt") as file:
        told = json.loads(file.metadata()["softhooks"])
    told["tensors"] = {name: list(table.shape) for name, table in held.items()}
    save_file(held, tmp_path / TENSORS, {"format": "pt", "softhooks": json.dumps(told)})
    with untouched(model), pytest.raises((CheckpointError, PromptMismatchError), match=r"shared|left|right"):
        softhooks.load(model, tmp_path)


# --- in every way of training -----------------------------------------------------------------------------------------


def task_rows(count: int = 12) -> list[dict[str, Tensor]]:
    return [row | {"task_ids": torch.tensor(number % K)} for number, row in enumerate(training.rows("causal", count))]


def test_mpt_under_the_trainers_defaults(tmp_path: Path) -> None:
    """The Trainer removes columns that the forward does not name: PEFT's task ids are gone; these are named."""
    model = zoo.build("llama")
    trainer, callback = training.prompted(tmp_path, model, "causal", method(), max_steps=12)
    assert trainer.args.remove_unused_columns
    trainer.train_dataset, trainer.eval_dataset = task_rows(), task_rows(6)
    start, before = training.trained(callback), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert not [name for name, value in training.trained(callback).items() if torch.equal(value, start[name])]
    trainer.save_model(str(tmp_path / "saved"))
    expected = answers(model)
    callback.soft_prompt.remove()
    softhooks.load(model, tmp_path / "saved")
    assert all(map(same_bits, answers(model), expected))


def test_the_same_training_fails_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=K)
    trainer = training.make(tmp_path, peft.get_peft_model(zoo.build("llama"), config), "causal", [], max_steps=1)
    trainer.train_dataset = task_rows()
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        trainer.train()


def test_without_task_ids_the_trainer_is_told(tmp_path: Path) -> None:
    trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", method(), max_steps=1)
    with pytest.raises(TrainerError, match="task_ids"):
        trainer.train()


def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "weight_decay": 0.1}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", method(rank=2), **options)
        trainer.train_dataset = task_rows()
        trainer.train(resume_from_checkpoint=resume)
        ends.append((training.losses(trainer), training.trained(callback)))
    assert training.equal(*ends)


def test_in_a_decorated_function(tmp_path: Path) -> None:
    model = zoo.build("llama")

    @softhooks.tune(method(), save_to=tmp_path)
    def train(model: Any, soft_prompt: Any = None) -> list[Tensor]:
        optimizer = torch.optim.AdamW(soft_prompt.parameters(), lr=0.05)
        for _ in range(2):
            model(zoo.text(4, 6), labels=zoo.text(4, 6), task_ids=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return answers(model)

    with untouched(model):
        expected = train(model)
        with softhooks.load(model, tmp_path):
            assert all(map(same_bits, answers(model), expected))


def test_a_deep_copy_has_its_own_tasks() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, method()) as prompt:
        before = answers(model)
        twin = copy.deepcopy(model)
        stir(prompt)
        assert all(map(same_bits, answers(twin), before))
        assert not any(map(torch.equal, answers(model), before))

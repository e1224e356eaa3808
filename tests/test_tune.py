"""Your own training loop: `with softhooks.attach(...)` and `@softhooks.tune(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    FrozenModifiedError,
    LlamaAdapter,
    NameTakenError,
    OptionError,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    SoftPrompt,
)

METHODS = {
    "prompt": PromptTuning(4),
    "prefix": PrefixTuning(4),
    "prefix-mlp": PrefixTuning(4, projection=True, hidden_size=16, dropout=0.1),
    "p-tuning-v2": PTuningV2(4, layers=[-1]),
    "adapter": LlamaAdapter(4),
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def batches(head: str = "causal") -> list[dict[str, torch.Tensor]]:
    data = training.rows(head)
    return [tf.default_data_collator(data[i : i + 4]) for i in range(0, len(data), 4)]


def steps(
    model: Any, parameters: Any, head: str = "causal", epochs: int = 4, optimizer: Any = torch.optim.AdamW
) -> list[float]:
    made = optimizer(list(parameters), lr=0.05)
    losses = []
    for _ in range(epochs):
        for batch in batches(head):
            loss = model(**batch).loss
            loss.backward()
            made.step()
            made.zero_grad()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """A model's output in evaluation mode; its mode is restored."""
    training_modules = [module for module in model.modules() if module.training]
    result: torch.Tensor = model.eval()(**batches("causal")[0]).logits
    for module in training_modules:
        module.training = True
    return result


# --- with -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("arch", "head"), [("llama", "causal"), ("bert", "sequence"), ("t5", "seq2seq")])
def test_a_loop_inside_with(tmp_path: Path, arch: str, head: str, method: str) -> None:
    model = zoo.build(arch, head)
    model(**batches(head)[0])  # the first labels make transformers write down the kind of problem
    with untouched(model):
        with softhooks.attach(model, METHODS[method]) as prompt:
            losses = steps(model, prompt.parameters(), head, epochs=6)
            assert sum(losses[-2:]) < sum(losses[:2])
            prompt.verify_frozen()
            prompt.save_pretrained(tmp_path)
        assert not prompt.is_attached
    softhooks.load(model, tmp_path)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True),
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1),
    ],
    ids=["adamw", "adamw-fused", "sgd"],
)
@pytest.mark.parametrize("method", ["prompt", "prefix", "adapter"])
def test_an_evaluation_between_steps_sees_every_step(method: str, optimizer: Any) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, METHODS[method]) as prompt:
        made = optimizer(list(prompt.parameters()), lr=0.05)
        seen = [logits(model)]
        for _ in range(3):
            model(**batches()[0]).loss.backward()
            seen.append(logits(model))  # the gradient is there, the step is not
            assert torch.equal(seen[-1], seen[-2])
            made.step()
            made.zero_grad()
            seen.append(logits(model))
            assert not torch.equal(seen[-1], seen[-2])


def test_an_error_inside_with_gives_the_model_back() -> None:
    def fail(model: Any) -> None:
        with softhooks.attach(model, METHODS["prefix"]) as prompt:
            steps(model, prompt.parameters(), epochs=1)
            raise ZeroDivisionError

    model = zoo.build("llama")
    with untouched(model), pytest.raises(ZeroDivisionError):
        fail(model)


# --- tune -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_decorated_function(tmp_path: Path, method: str) -> None:
    answers: list[torch.Tensor] = []

    @softhooks.tune(METHODS[method], save_to=tmp_path / "saved")
    def train(model: Any, count: int = 1, *, soft_prompt: SoftPrompt) -> list[float]:
        """Train."""
        losses = steps(model, soft_prompt.parameters(), epochs=count)
        answers.append(logits(model))
        return losses

    assert train.__name__ == "train"
    assert train.__doc__ == "Train."
    model = zoo.build("llama")
    with untouched(model):
        losses = train(model, count=6)
    assert sum(losses[-2:]) < sum(losses[:2])
    softhooks.load(model, tmp_path / "saved")
    assert torch.equal(logits(model), answers[0])


def test_a_function_without_the_parameter_trains_what_requires_gradients(tmp_path: Path) -> None:
    @softhooks.tune(METHODS["prompt"], save_to=str(tmp_path / "saved"), name="mine")
    def train(loader: Any, model: Any) -> list[str]:
        steps(model, [p for p in model.parameters() if p.requires_grad], epochs=1)
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    assert train([], zoo.build("llama")) == ["soft_prompt.mine.encoder.embeddings"]
    assert (tmp_path / "saved" / "soft_prompt.safetensors").is_file()


def test_a_function_that_raises_saves_nothing(tmp_path: Path) -> None:
    @softhooks.tune(METHODS["prompt"], save_to=tmp_path / "saved")
    def train(model: Any) -> None:
        raise ZeroDivisionError

    model = zoo.build("llama")
    with untouched(model), pytest.raises(ZeroDivisionError):
        train(model)
    assert not (tmp_path / "saved").exists()


def test_a_function_that_moves_the_base_saves_nothing(tmp_path: Path) -> None:
    @softhooks.tune(METHODS["prompt"], save_to=tmp_path / "saved")
    def train(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1

    model = zoo.build("llama")
    with pytest.raises(FrozenModifiedError, match="lm_head"):
        train(model)
    assert not (tmp_path / "saved").exists()
    assert not hasattr(model, "soft_prompt")


def test_each_call_has_a_prompt_of_its_own() -> None:
    seen: list[SoftPrompt] = []

    @softhooks.tune(METHODS["prompt"])
    def train(model: Any, soft_prompt: SoftPrompt) -> None:
        seen.append(soft_prompt)

    model = zoo.build("llama")
    train(model)
    train(model)
    assert seen[0] is not seen[1]
    assert not any(prompt.is_attached for prompt in seen)


def test_the_model_is_found_by_name() -> None:
    @softhooks.tune(METHODS["prompt"], model="student")
    def train(teacher: Any, student: Any) -> tuple[bool, bool]:
        return hasattr(teacher, "soft_prompt"), hasattr(student, "soft_prompt")

    assert train(zoo.build("llama"), zoo.build("gpt2")) == (False, True)
    assert train(student=zoo.build("gpt2"), teacher=zoo.build("llama")) == (False, True)
    with pytest.raises(OptionError, match="'student'"):
        train(zoo.build("llama"), "gpt2")


def test_the_model_is_found_in_every_kind_of_argument() -> None:
    @softhooks.tune(METHODS["prompt"])
    def train(*args: Any, **kwargs: Any) -> bool:
        return any(hasattr(value, "soft_prompt") for value in (*args, *kwargs.values()))

    assert train(1, zoo.build("llama"))
    assert train(net=zoo.build("llama"))


def test_a_method_of_a_class(tmp_path: Path) -> None:
    class Script:
        """A script in the form of a class."""

        rate = 0.05

        @softhooks.tune(METHODS["prefix"], save_to=tmp_path)
        def fit(self, model: Any, soft_prompt: Any) -> float:
            steps(model, soft_prompt.parameters(), epochs=1)
            return self.rate

        @staticmethod
        @softhooks.tune(METHODS["prefix"])
        def check(model: Any) -> bool:
            return hasattr(model, "soft_prompt")

    assert Script().fit(zoo.build("llama")) == 0.05
    assert Script.check(zoo.build("llama"))


def test_options_go_through(tmp_path: Path) -> None:
    @softhooks.tune(METHODS["prompt"], train_head=False, trainable="bert.pooler.*", save_to=tmp_path)
    def train(model: Any, soft_prompt: SoftPrompt) -> list[str]:
        return [name for name, _ in soft_prompt.named_parameters()]

    assert train(zoo.build("bert", "sequence")) == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "soft_prompt.default.encoder.embeddings",
    ]


def test_a_call_without_a_model_is_refused() -> None:
    @softhooks.tune(METHODS["prompt"])
    def train(model: Any, loader: Any = None) -> None:
        pytest.fail("the function must not run")

    with pytest.raises(OptionError, match="model: str"):
        train("llama")
    with pytest.raises(OptionError, match="nothing"):
        train()
    with pytest.raises(TypeError, match="unexpected keyword"):
        train(zoo.build("llama"), lodaer=[])


def test_a_model_with_a_prompt_of_that_name_is_refused() -> None:
    @softhooks.tune(METHODS["prompt"])
    def train(model: Any) -> None:
        pytest.fail("the function must not run")

    model = zoo.build("llama")
    with softhooks.attach(model, METHODS["prompt"]) as prompt:
        with pytest.raises(NameTakenError):
            train(model)
        assert prompt.is_attached


def test_functions_that_run_later_are_refused() -> None:
    async def later(model: Any) -> None: ...

    def piece_by_piece(model: Any) -> Iterator[int]:
        yield 1

    for function in (later, piece_by_piece):
        with pytest.raises(OptionError, match=function.__name__):
            softhooks.tune(METHODS["prompt"])(function)


def test_a_trainer_inside_a_decorated_function_takes_the_prompt_up(tmp_path: Path) -> None:
    @softhooks.tune(METHODS["prompt"], save_to=tmp_path / "saved")
    def train(model: Any, soft_prompt: SoftPrompt) -> bool:
        trainer, callback = training.prompted(tmp_path, model, "causal", METHODS["prompt"])
        trainer.train()
        return callback.soft_prompt is soft_prompt

    model = zoo.build("llama")
    assert train(model)
    assert "save_pretrained" not in model.__dict__

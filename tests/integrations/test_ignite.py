"""PyTorch-Ignite: an Engine trains a prompt; its Checkpoint holds the prompt and restores it bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ignite")

import contexts
import examples
import torch
import training
import zoo
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from launch import SCRIPTS, launch
from table import TRAINED
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import FrozenModifiedError, NotAttachedError, PrefixTuning, PromptTuning, SoftHooksError, TrainerError
from softhooks.integrations.ignite import track


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


class Run:
    """A plain Ignite training script, with a model that has dropout."""

    def __init__(
        self, folder: Path, method: softhooks.method.Method, arch: str = "bert", head: str = "sequence", **wrong: Any
    ) -> None:
        self.model = wrong.get("model") or zoo.build(arch, head).train()
        torch.manual_seed(3)
        self.prompt = softhooks.attach(self.model, method, wrong.get("name", "default"))
        self.optimizer = wrong.get("optimizer", torch.optim.AdamW)(self.prompt.parameters(), lr=1e-2)
        self.losses: list[float] = []
        self.trainer = Engine(wrong.get("step", self.step))
        self.live = track(self.trainer, self.prompt, self.optimizer)
        self.to_save = {"prompt": self.live, "optimizer": self.optimizer, "trainer": self.trainer}
        self.checkpoint = Checkpoint(self.to_save, DiskSaver(str(folder), require_empty=False), n_saved=None)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.checkpoint)
        # Dropout and order follow the epoch. (A DeterministicEngine's state holds numpy's, which Ignite itself cannot load.)
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: torch.manual_seed(engine.state.epoch))
        self.loader = torch.utils.data.DataLoader(training.rows(head), batch_size=4, shuffle=True)

    def step(self, engine: Engine, batch: dict[str, Tensor]) -> float:
        self.model.train()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def go(self, epochs: int) -> Run:
        self.trainer.run(self.loader, max_epochs=epochs)
        return self

    def trained(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.prompt.named_parameters()}


@pytest.mark.parametrize("entry", TRAINED, ids=str)
def test_a_run_that_goes_on_in_a_fresh_model_ends_where_an_uninterrupted_one_ends(tmp_path: Path, entry: Any) -> None:
    torch.manual_seed(0)
    whole = Run(tmp_path / "whole", entry.make(4)).go(3)
    assert len(whole.losses) == 6

    torch.manual_seed(0)
    Run(tmp_path / "cut", entry.make(4)).go(1)
    torch.manual_seed(0)
    later = Run(tmp_path / "cut", entry.make(4))
    training_start = later.trained()
    Checkpoint.load_objects(later.to_save, tmp_path / "cut" / "checkpoint_2.pt")
    assert not training.equal(training_start, later.trained())
    later.go(3)

    assert later.losses == whole.losses[2:]
    assert training.equal(later.trained(), whole.trained())
    assert training.equal(later.optimizer.state_dict(), whole.optimizer.state_dict())


def test_only_the_prompt_and_its_head_train(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence").train()
    model.config.problem_type = "single_label_classification"  # which the model itself would set at its first loss
    with untouched(model):
        before = training.base_of(model)
        run = Run(tmp_path, PrefixTuning(4), model=model)
        start = run.trained()
        run.go(2)
        assert training.equal(training.base_of(model), before)
        assert all(name.startswith("soft_prompt.default.") for name in start)
        assert not any(torch.equal(start[name], tensor) for name, tensor in run.trained().items())
        assert run.live.report is not None
        base = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if "soft_prompt" not in name]
        assert run.live.report.tensors == len(base)
        assert run.model(**next(iter(run.loader))).logits.shape == (4, 3)
        run.prompt.remove()


def test_a_checkpoint_holds_the_prompt_and_not_the_base(tmp_path: Path) -> None:
    run = Run(tmp_path, PrefixTuning(4, projection=True, hidden_size=16)).go(1)
    held = torch.load(tmp_path / "checkpoint_2.pt", weights_only=True)
    description = "soft_prompt.default.description"
    assert set(held["prompt"]) == {*run.trained(), description}
    assert training.equal({k: v for k, v in held["prompt"].items() if k != description}, run.trained())
    assert len(held["optimizer"]["state"]) == len(run.trained())


def test_save_pretrained_writes_what_another_model_loads(tmp_path: Path) -> None:
    run = Run(tmp_path, PrefixTuning(4)).go(1)
    run.model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("config.json"))
    fresh = zoo.build("bert", "sequence")
    softhooks.load(fresh, tmp_path / "saved")
    batch = {"input_ids": zoo.text(2)}
    torch.testing.assert_close(fresh(**batch).logits, run.model.eval()(**batch).logits, rtol=0, atol=1e-6)


def test_constraints_run_after_each_step(tmp_path: Path) -> None:
    """With a learning rate that would move the context far away, it is within its bounds after each iteration."""
    epsilon = 0.05
    run = Run(tmp_path, contexts.method(epsilon_input=epsilon, epsilon_format=epsilon), "llama", "causal")
    run.optimizer.param_groups[0]["lr"] = 1.0
    norms: list[float] = []

    @run.trainer.on(Events.ITERATION_COMPLETED)
    def _look(_engine: Engine) -> None:
        encoder: Any = run.prompt.encoder
        norms.append(float((encoder.delta.detach().norm(dim=-1) / encoder.bounds).max()))

    run.go(2)
    assert len(norms) == 4
    assert norms == pytest.approx([1.0] * 4, rel=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _attached() -> tuple[Any, softhooks.SoftPrompt]:
    model = zoo.build("bert", "sequence")
    return model, softhooks.attach(model, PromptTuning(4))


def _over_the_model(model: Any, prompt: softhooks.SoftPrompt) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _over_a_part(model: Any, prompt: softhooks.SoftPrompt) -> torch.optim.Optimizer:
    return torch.optim.SGD(prompt.encoder.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [_over_the_model, _over_a_part])
def test_an_optimizer_must_hold_what_the_prompt_trains(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, prompt = _attached()
    engine = Engine(lambda engine, batch: None)
    with untouched(model), pytest.raises(TrainerError, match="exactly the trainable parameters"):
        track(engine, prompt, make(model, prompt))
    assert not engine.has_event_handler(Events)


def test_parameters_that_an_optimizer_is_given_later_are_found_when_the_run_begins(tmp_path: Path) -> None:
    run = Run(tmp_path, PromptTuning(4))
    run.optimizer.add_param_group({"params": [next(run.model.bert.parameters())]})
    with pytest.raises(TrainerError, match="exactly the trainable parameters"):
        run.go(1)
    assert run.losses == []


def test_what_is_tracked_must_be_an_engine() -> None:
    _, prompt = _attached()
    with pytest.raises(TrainerError, match=r"was given dict instead of an ignite\.engine\.Engine"):
        track({}, prompt, torch.optim.SGD(prompt.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"method": PromptTuning(4)}, "differ in the method"),
        ({"method": PrefixTuning(5)}, "differ in the method"),
        ({"method": PrefixTuning(4), "optimizer": torch.optim.SGD}, "differ in the optimizer"),
        ({"method": PrefixTuning(4), "name": "other"}, "names and shapes must match"),
        ({"method": PrefixTuning(4), "arch": "roberta"}, "differ in the base model"),
    ],
    ids=["method", "shape", "optimizer", "name", "base"],
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    Run(tmp_path, PrefixTuning(4)).go(1)
    run = Run(tmp_path, **other)
    before = run.trained()
    with pytest.raises(TrainerError, match=says):
        Checkpoint.load_objects({"prompt": run.live}, tmp_path / "checkpoint_2.pt")
    assert training.equal(run.trained(), before)


def test_a_checkpoint_without_a_prompt_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, PrefixTuning(4))
    for state, says in (
        ({"weight": torch.zeros(1)}, "has no prompt named"),
        ({"epoch": 3}, "it must hold tensors only"),
    ):
        with pytest.raises(TrainerError, match=says):
            Checkpoint.load_objects({"prompt": run.live}, {"prompt": state})


def test_one_prompt_of_a_model_is_tracked(tmp_path: Path) -> None:
    run = Run(tmp_path, PromptTuning(4))
    second = softhooks.attach(run.model, PrefixTuning(4), "second")
    optimizer = torch.optim.SGD([p for n, p in second.named_parameters() if ".second." in n])
    with pytest.raises(TrainerError, match="already hold the prompt 'default'; they can hold only one prompt"):
        track(Engine(lambda engine, batch: None), second, optimizer)


def test_a_prompt_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    model, prompt = _attached()
    prompt.save_pretrained(tmp_path)
    prompt.remove()
    loaded = softhooks.load(model, tmp_path)
    with pytest.raises(TrainerError, match="has no trainable parameters"):
        track(Engine(lambda engine, batch: None), loaded, torch.optim.SGD([torch.zeros(1, requires_grad=True)]))


def test_a_prompt_removed_in_mid_run_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, PromptTuning(4))
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda _engine: run.prompt.remove())
    with pytest.raises(NotAttachedError, match="removed"):
        run.trainer.run([next(iter(run.loader))], max_epochs=1)


def test_a_step_whose_loss_does_not_reach_the_prompt_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, PromptTuning(4))

    def bypass(engine: Engine, batch: dict[str, Tensor]) -> None:
        with softhooks.disabled(run.model):
            run.step(engine, batch)

    other = Engine(bypass)
    track(other, run.prompt, run.optimizer)
    with pytest.raises((TrainerError, RuntimeError), match=r"gradient|does not require grad"):
        other.run(run.loader)

    def detached(engine: Engine, batch: dict[str, Tensor]) -> None:
        run.model(**batch)
        run.optimizer.step()

    third = Engine(detached)
    track(third, run.prompt, run.optimizer)
    with pytest.raises(TrainerError, match="no gradient reached the prompt"):
        third.run(run.loader)


def test_a_base_that_moves_is_found_when_the_run_is_completed(tmp_path: Path) -> None:
    run = Run(tmp_path, PromptTuning(4))
    weight = run.model.bert.encoder.layer[1].output.dense.weight

    def move(_engine: Engine) -> None:
        weight.data[0, 0] += 1e-3

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), move)
    with pytest.raises(FrozenModifiedError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        run.go(1)


def test_without_ignite_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prompt = _attached()
    monkeypatch.setitem(sys.modules, "ignite.engine", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[ignite\]"'):
        track(None, prompt, None)  # type: ignore[arg-type]


def test_the_example_runs() -> None:
    names = examples.run("ignite")
    assert names["trainer"].state.epoch == 2
    assert names["to_save"]["prompt"].report.tensors > 0


@pytest.mark.slow
def test_two_processes_train_one_prompt() -> None:
    status, told = launch(SCRIPTS / "ignited.py")
    assert status == 0, told
    assert all(f"rank {rank} of DistributedDataParallel: frozen: " in told for rank in (0, 1))


@pytest.mark.slow
def test_two_processes_that_train_apart_are_an_error() -> None:
    status, told = launch(SCRIPTS / "ignited.py", "apart")
    assert status != 0
    assert "the prompt of rank 1 differs from that of rank 0" in told

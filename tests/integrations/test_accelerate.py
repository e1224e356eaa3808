"""accelerate: checkpoints hold only the prompt and resume bit for bit; refusals."""

from __future__ import annotations

import gc
import runpy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import examples
import pytest
import torch
import training
import zoo
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, ProjectConfiguration
from contexts import method as cpt
from launch import SCRIPTS, results
from untouched import untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning, PTuning, SoftPromptCallback, TrainerError
from softhooks.errors import FrozenModifiedError
from softhooks.formats.softhooks_files import LIVE
from softhooks.integrations.accelerate import track
from softhooks.runtime.prompted_model import prompted_model_of


@pytest.fixture(autouse=True)
def _an_accelerate_of_its_own() -> Iterator[None]:
    """Reset accelerate's process-wide state, so that no test sees another one's precision or accumulation."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


METHODS = {
    "prompt": PromptTuning(4),
    "mlp": PrefixTuning(4, projection=True, hidden_size=8),
    "lstm": PTuning(4, encoder="lstm", hidden_size=8),
}


class Run:
    """One training script: a model, its prompt, an optimizer with momenta, a schedule, and rows in a drawn order."""

    def __init__(
        self, method: Any, arch: str = "llama", head: str = "causal", first: str = "attach", **options: Any
    ) -> None:
        self.accelerator = Accelerator(cpu=True, **options)
        model = zoo.build(arch, head)
        if first == "prepare":
            model = self.accelerator.prepare(model)
        torch.manual_seed(3)
        self.prompt = softhooks.attach(self.accelerator.unwrap_model(model), method)
        if first != "prepare":
            track(self.accelerator, self.prompt)
        optimizer = torch.optim.AdamW(self.prompt.parameters(), lr=2e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        loader = torch.utils.data.DataLoader(training.rows(head), batch_size=4, shuffle=True)
        rest = (optimizer, schedule, loader)
        if first == "prepare":
            self.model = model
            self.optimizer, self.schedule, self.loader = self.accelerator.prepare(*rest)
            track(self.accelerator, self.prompt)
        else:
            self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(model, *rest)
        self.model.train()

    def epoch(self) -> list[float]:
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.prompt.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.prompt.named_parameters()}


def spoil(prompt: Any) -> None:
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.fill_(0.123)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["attach", "prepare"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_bit_for_bit_in_a_fresh_model(tmp_path: Path, name: str, first: str) -> None:
    run = Run(METHODS[name], first=first)
    base = training.base_of(run.prompt.model)
    before = run.trained
    run.epoch()
    run.accelerator.save_state(str(tmp_path))
    at_save = run.trained
    losses = run.epoch()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in run.trained.items())
    assert run.prompt.verify_frozen().tensors >= len(base) > 0
    assert training.equal(training.base_of(run.prompt.model), base)

    again = Run(METHODS[name], first=first)
    spoil(again.prompt)
    again.accelerator.load_state(str(tmp_path))
    assert training.equal(again.trained, at_save)
    assert again.epoch() == losses
    assert training.equal(again.trained, run.trained)
    assert training.equal(again.optimizer.state_dict(), run.optimizer.state_dict())


def test_a_checkpoint_holds_the_prompt_only_and_loads_as_one(tmp_path: Path) -> None:
    run = Run(METHODS["mlp"])
    run.epoch()
    run.accelerator.save_state(str(tmp_path))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        LIVE, "soft_prompt.json", "soft_prompt.safetensors", "model.safetensors.index.json", "optimizer.bin",
        "scheduler.bin", "random_states_0.pkl",
    }  # fmt: skip
    model = zoo.build("llama")
    softhooks.load(model, tmp_path)
    ids = zoo.text()
    run.model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, run.model(ids).logits)
        assert model(ids).logits.shape == zoo.build("llama")(ids).logits.shape


def test_a_head_and_what_stands_around_the_model_go_on_too(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = zoo.build("bert", "sequence")
            torch.manual_seed(1)
            self.own = torch.nn.Linear(3, 1)

        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            output = self.model(**batch)
            return output.loss + self.own(output.logits).square().mean()

    def begin() -> tuple[Any, Any, Any]:
        accelerator, net = Accelerator(cpu=True), Net()
        prompt = track(accelerator, softhooks.attach(net.model, METHODS["prompt"]))
        optimizer = torch.optim.SGD([*prompt.parameters(), *net.own.parameters()], lr=0.1, momentum=0.9)
        net, _ = accelerator.prepare(net, optimizer)
        return accelerator, net, optimizer

    def step(accelerator: Any, net: Any, optimizer: Any) -> None:
        batch = torch.utils.data.default_collate(training.rows("sequence"))
        accelerator.backward(net(**batch))
        optimizer.step()
        optimizer.zero_grad()

    run = begin()
    step(*run)
    run[0].save_state(str(tmp_path))
    step(*run)
    again = begin()
    again[0].load_state(str(tmp_path))
    step(*again)
    assert training.equal(dict(run[1].state_dict()), dict(again[1].state_dict()))
    assert "soft_prompt.default.heads.classifier.weight" in dict(
        prompted_model_of(again[1].model).model.named_parameters()
    )
    with pytest.raises(TrainerError, match="own"):
        run[0].save_model(run[1], tmp_path / "model")

    with torch.no_grad():
        again[1].own = torch.nn.Linear(3, 2)
    before = training.base_of(again[1], "nothing")
    with pytest.raises(TrainerError, match="outside the prompted model; names and shapes must match"):
        again[0].load_state(str(tmp_path))
    assert training.equal(training.base_of(again[1], "nothing"), before)


def test_names_and_limit_are_those_of_the_accelerator(tmp_path: Path) -> None:
    naming = {"project_config": ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=2)}
    run = Run(METHODS["lstm"], **naming)
    seen = []
    for _ in range(3):
        run.epoch()
        run.accelerator.save_state()
        seen.append(run.trained)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"checkpoint_1", "checkpoint_2"}
    again = Run(METHODS["lstm"], **naming)
    again.accelerator.load_state()
    assert training.equal(again.trained, seen[2])
    again.accelerator.load_state(str(tmp_path / "checkpoints" / "checkpoint_1"))
    assert training.equal(again.trained, seen[1])


def test_two_models_have_a_prompt_each_and_a_third_stays_whole(tmp_path: Path) -> None:
    def begin() -> tuple[Any, list[Any], Any]:
        accelerator, bare = Accelerator(cpu=True), torch.nn.Linear(2, 2)
        models = [zoo.build("llama"), zoo.build("gpt2")]
        prompts = [track(accelerator, softhooks.attach(model, METHODS["prompt"])) for model in models]
        accelerator.prepare(models[0], bare, models[1])
        return accelerator, prompts, bare

    accelerator, prompts, bare = begin()
    accelerator.save_state(str(tmp_path))
    again, others, other = begin()
    for prompt in others:
        spoil(prompt)
    again.load_state(str(tmp_path))
    for prompt, found in zip(prompts, others, strict=True):
        assert training.equal(list(prompt.parameters()), list(found.parameters()))
    assert torch.equal(bare.weight, other.weight)
    softhooks.load(zoo.build("gpt2"), tmp_path / "soft_prompt_1")


# --- training ---------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_equal_those_of_one_large_batch() -> None:
    rows = training.rows("causal")

    def train(size: int) -> torch.Tensor:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=8 // size)
        model = zoo.build("llama")
        torch.manual_seed(3)
        prompt = track(accelerator, softhooks.attach(model, METHODS["prompt"]))
        optimizer = torch.optim.SGD(prompt.parameters(), lr=1.0)
        loader = torch.utils.data.DataLoader(rows, batch_size=size)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prompt.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
        return prompt.encoder.embeddings.detach()

    assert torch.allclose(train(2), train(8), atol=1e-6)


def test_a_constraint_holds_after_each_step() -> None:
    accelerator, model = Accelerator(cpu=True), zoo.build("llama")
    prompt = track(accelerator, softhooks.attach(model, cpt()))
    optimizer = torch.optim.SGD(prompt.parameters(), lr=50.0)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    batch = torch.utils.data.default_collate(training.rows("causal"))
    moved = []
    for _ in range(2):
        accelerator.backward(model(**batch).loss)
        free = prompt.encoder.delta.detach() - 50.0 * prompt.encoder.delta.grad
        optimizer.step()
        optimizer.zero_grad()
        moved.append(float((free - prompt.encoder.delta.detach()).abs().max()))
        lengths = torch.linalg.vector_norm(prompt.encoder.delta.detach(), dim=1)
        assert bool((lengths <= prompt.encoder.bounds * (1 + 1e-5)).all())
    assert all(distance > 1e-3 for distance in moved)


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_bf16_trains_and_goes_on(tmp_path: Path, first: str) -> None:
    run = Run(METHODS["mlp"], first=first, mixed_precision="bf16")
    run.epoch()
    run.accelerator.save_state(str(tmp_path))
    losses = run.epoch()
    assert all(parameter.dtype == torch.float32 for parameter in run.prompt.parameters())
    again = Run(METHODS["mlp"], first=first, mixed_precision="bf16")
    again.accelerator.load_state(str(tmp_path))
    assert again.epoch() == losses
    run.prompt.verify_frozen()


# --- what else an Accelerator writes ----------------------------------------------------------------------------------


def test_the_model_unwraps_to_itself_and_is_saved_as_its_prompt(tmp_path: Path) -> None:
    run = Run(METHODS["prompt"])
    run.epoch()
    model = run.accelerator.unwrap_model(run.model)
    assert model is run.prompt.model
    run.accelerator.save_model(run.model, str(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "checkpoint-4", is_main_process=True, save_function=run.accelerator.save)
    for folder in ("saved", "checkpoint-4"):
        assert {f.name for f in (tmp_path / folder).iterdir()} == {"soft_prompt.json", "soft_prompt.safetensors"}
        fresh = zoo.build("llama")
        softhooks.load(fresh, tmp_path / folder)
        assert torch.equal(fresh(zoo.text()).logits, model.eval()(zoo.text()).logits)
    with pytest.raises(TrainerError, match="only the prompt of a prompted model, and only in safetensors"):
        run.accelerator.save_model(run.model, str(tmp_path / "bin"), safe_serialization=False)
    assert not (tmp_path / "bin").exists()
    run.accelerator.save_model(torch.nn.Linear(2, 2), str(tmp_path / "linear"))
    assert (tmp_path / "linear" / "model.safetensors").is_file()


def test_without_its_prompt_model_and_accelerator_are_as_before(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), zoo.build("llama")
    own = accelerator.save_model
    with untouched(model):
        prompt = track(accelerator, softhooks.attach(model, METHODS["prompt"]))
        assert accelerator.save_model != own
        prompt.remove()
    assert accelerator.save_model == own
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook
    assert "save_model" not in vars(accelerator)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size > 50_000


def test_an_accelerator_that_has_freed_its_models_takes_another(tmp_path: Path) -> None:
    run = Run(METHODS["prompt"])
    accelerator, model = run.accelerator, weakref.ref(run.prompt.model)
    accelerator.free_memory()
    del run
    gc.collect()
    assert model() is None
    second = zoo.build("gpt2")
    track(accelerator, softhooks.attach(second, METHODS["prompt"]))
    accelerator.prepare(second)
    accelerator.save_state(str(tmp_path))
    softhooks.load(zoo.build("gpt2"), tmp_path)


def test_an_accelerator_and_its_model_are_freed_with_their_last_reference() -> None:
    run = Run(METHODS["prompt"])
    accelerator, model = weakref.ref(run.accelerator), weakref.ref(run.prompt.model)
    del run
    gc.collect()
    assert accelerator() is None
    assert model() is None


def test_the_example_trains() -> None:
    left = examples.run("accelerate")
    fresh = softhooks.attach(zoo.build("llama"), PrefixTuning(16, projection=True))
    moved = [not torch.equal(a, b) for a, b in zip(left["prompt"].parameters(), fresh.parameters(), strict=True)]
    assert all(moved)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    run = Run(METHODS["mlp"])
    run.epoch()
    run.accelerator.save_state(str(tmp_path))

    def refused(message: str, other: Run, folder: Path = tmp_path) -> str:
        before = other.trained
        with pytest.raises(TrainerError, match=message) as told:
            other.accelerator.load_state(str(folder))
        assert training.equal(other.trained, before)
        return str(told.value)

    assert "prefix_tuning" in refused("differ in the method", Run(METHODS["prompt"]))
    refused("differ in the method", Run(PrefixTuning(5, projection=True, hidden_size=8)))
    other = zoo.build("llama", seed=9)
    accelerator = Accelerator(cpu=True)
    track(accelerator, softhooks.attach(other, METHODS["mlp"]))
    accelerator.prepare(other)
    with pytest.raises(TrainerError, match="differ in the base model"):
        accelerator.load_state(str(tmp_path))

    sgd = Accelerator(cpu=True)
    model = zoo.build("llama")
    prompt = track(sgd, softhooks.attach(model, METHODS["mlp"]))
    sgd.prepare(model, torch.optim.SGD(prompt.parameters(), lr=0.1))
    with pytest.raises(TrainerError, match="differ in the optimizer"):
        sgd.load_state(str(tmp_path))

    (tmp_path / "empty").mkdir()
    assert LIVE in refused(
        "has no soft_prompt.live.safetensors with the prompt", Run(METHODS["mlp"]), tmp_path / "empty"
    )


def test_a_base_that_moved_is_found_before_a_checkpoint_is_written(tmp_path: Path) -> None:
    run = Run(METHODS["prompt"])
    with torch.no_grad():
        run.prompt.model.lm_head.weight[0, 0] += 1
    with pytest.raises(FrozenModifiedError, match="lm_head"):
        run.accelerator.save_state(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_would_not_train_or_save_rightly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model = Accelerator(cpu=True), zoo.build("llama")
    prompt = softhooks.attach(model, METHODS["prompt"])
    with untouched(model):
        with pytest.raises(TrainerError, match="given LlamaForCausalLM"):
            track(model, prompt)
        for kind, words in [("FSDP", "shards of the whole"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron")]:
            with monkeypatch.context() as patch:
                patch.setitem(accelerator.state._shared_state, "distributed_type", DistributedType(kind))
                with pytest.raises(TrainerError, match=words):
                    track(accelerator, prompt)
    track(accelerator, prompt)
    other = softhooks.attach(model, PrefixTuning(2), "other")
    with pytest.raises(TrainerError, match="can track one prompt per model"):
        track(accelerator, other)
    other.remove()
    with pytest.raises(TrainerError, match=r"prepared: +none"):
        accelerator.save_state(str(tmp_path))
    accelerator.prepare(model, torch.optim.SGD(list(model.lm_head.parameters()), lr=0.1))
    with pytest.raises(TrainerError, match=r"missing: +soft_prompt.default.encoder.embeddings"):
        accelerator.save_state(str(tmp_path))

    early = Accelerator(cpu=True)
    late = zoo.build("llama")
    early.prepare(late, torch.optim.SGD(late.parameters(), lr=0.1))
    with pytest.raises(TrainerError, match="the optimizers lack"):
        track(early, softhooks.attach(late, METHODS["prompt"]))
    folded = softhooks.attach(zoo.build("llama"), METHODS["prompt"])
    folded.save_pretrained(tmp_path / "saved")
    done = softhooks.load(zoo.build("llama"), tmp_path / "saved")
    with pytest.raises(TrainerError, match="has no trainable parameters"):
        track(early, done)


def test_a_trainer_may_go_on_with_the_prompt(tmp_path: Path) -> None:
    run = Run(METHODS["prompt"])
    run.epoch()
    callback = SoftPromptCallback(METHODS["prompt"])
    trainer = training.make(tmp_path, run.prompt.model, "causal", [callback], save_strategy="steps", save_steps=2)
    trainer.train()
    assert callback.soft_prompt is run.prompt
    assert (tmp_path / "checkpoint-2" / LIVE).is_file()


# --- two processes ----------------------------------------------------------------------------------------------------


def test_two_processes_train_and_go_on_as_one_does(tmp_path: Path) -> None:
    first, second = results(tmp_path, SCRIPTS / "accelerated.py", tmp_path)
    alone: dict[str, Any] = {}
    runpy.run_path(str(SCRIPTS / "accelerated.py"))["train_and_resume"](tmp_path / "alone", alone)
    for name in ("prompt", "mlp"):
        assert training.equal(first[name], second[name])
        assert all(torch.allclose(first[name][key], alone[name][key], atol=2e-5) for key in alone[name])
        assert training.equal(first[f"{name} resumed"], first[name])
        assert training.equal(second[f"{name} resumed"], first[name])
        assert all(not torch.equal(first[name][key], first[f"{name} start"][key]) for key in first[name])
    assert torch.equal(first["head"], second["head"])
    for seen in (first, second):
        assert seen["late"].startswith("TrainerError: the model of 'default' was prepared before `track`")
        assert seen["apart"].startswith("TrainerError: the prompt of rank 1 differs from that of rank 0;")

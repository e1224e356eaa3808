"""Checkpoints of a Trainer with a SoftPromptCallback: small, exact, and not loadable as a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from safetensors.torch import load_file, save_file
from trainings import METHODS, SAVING, Keeper, keep
from untouched import differences, remove_all, snapshot

import softhooks
from softhooks import PrefixTuning, PromptTuning, SoftPromptCallback, TrainerError
from softhooks.formats.softhooks_files import LIVE, TENSORS
from softhooks.method import Method

RUNS = [
    ("llama", "causal", "prompt"),
    ("llama", "causal", "prefix"),
    ("gemma3", "causal", "prefix-mlp"),
    ("bert", "sequence", "prompt"),
    ("bert", "sequence", "prefix-mlp"),
    ("t5", "seq2seq", "prefix-mlp"),
    ("gptj", "causal", "prompt"),
    ("bert", "sequence", "p-tuning-v2"),
    ("deberta-v2", "sequence", "p-tuning-v2"),
    ("albert", "tokens", "p-tuning-v2"),
    ("llama", "causal", "residual"),
    ("llama", "causal", "adapter"),
    ("bert", "sequence", "adapter"),
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@dataclass(frozen=True)
class Run:
    """A finished run on disk, and its outputs."""

    folder: Path
    numbers: int
    logits: torch.Tensor


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run for all tests that only read its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    model = zoo.build("llama")
    trainer, callback = training.prompted(folder, model, "causal", METHODS["prompt"], **SAVING)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    assert callback.soft_prompt is not None
    with callback.soft_prompt as prompt, torch.no_grad():
        return Run(folder, prompt.num_parameters, model.eval()(zoo.text()).logits)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run"


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "head", "method"), RUNS)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path, arch: str, head: str, method: str) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "weight_decay": 0.1,
        "warmup_steps": 2,
    }
    keeper = Keeper()
    whole, _ = training.prompted(tmp_path, zoo.build(arch, head), head, METHODS[method], keeper, **options)
    whole.train()

    model = zoo.build(arch, head)
    base = training.base_of(model)
    resumed, other = training.prompted(tmp_path, model, head, METHODS[method], **options)
    training.spoil(other)
    with training.logged() as messages:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not [message for message in messages if "keys" in message]
    assert training.losses(resumed) == training.losses(whole)
    assert len(training.losses(resumed)) == 6
    assert training.equal(keep(model, resumed.optimizer), keeper.kept[6])
    assert not training.equal(keeper.kept[3][0], keeper.kept[6][0])
    assert training.equal(training.base_of(model), base)
    assert other.report is not None


def test_a_resumed_run_goes_on_in_the_same_trainer(tmp_path: Path) -> None:
    keeper = Keeper()
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prefix"], keeper, **SAVING)
    trainer.train()
    expected = keeper.kept[4]
    training.spoil(callback)
    trainer.train(resume_from_checkpoint=True)
    assert training.equal(training.trained(callback), expected[0])
    training.spoil(callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.equal(training.trained(callback), expected[0])


@pytest.mark.parametrize(
    ("arch", "head", "method"), [("llama", "causal", "prompt"), ("bert", "sequence", "prefix-mlp")]
)
def test_the_best_model_is_restored(tmp_path: Path, arch: str, head: str, method: str) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0, 0.0])
    keeper = Keeper()
    model = zoo.build(arch, head)
    trainer, callback = training.prompted(
        tmp_path, model, head, METHODS[method], keeper, load_best_model_at_end=True,
        metric_for_best_model="score", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=4,
        given={"compute_metrics": lambda prediction: {"score": next(scores)}},
    )  # fmt: skip
    with training.logged() as messages:
        trainer.train()
    assert not [message for message in messages if "keys" in message]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert training.equal(training.trained(callback), keeper.kept[2][0])
    assert not training.equal(keeper.kept[2][0], keeper.kept[4][0])
    assert callback.report is not None
    # and the model answers as the best one did
    batch = tf.default_data_collator(training.rows(head))
    fresh = zoo.build(arch, head)
    softhooks.load(fresh, tmp_path / "checkpoint-2")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, fresh(**batch).logits)


def test_a_model_made_with_its_prompt_inside_model_init_resumes(tmp_path: Path) -> None:
    def build() -> Any:
        model = zoo.build("llama")
        softhooks.attach(model, METHODS["prefix-mlp"])
        return model

    def trainer() -> tuple[tf.Trainer, SoftPromptCallback]:
        return training.prompted(tmp_path, None, "causal", METHODS["prefix-mlp"], given={"model_init": build}, **SAVING)

    whole, callback = trainer()
    whole.train()
    resumed, other = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.equal(training.trained(other), training.trained(callback))
    assert training.losses(resumed) == training.losses(whole)


def test_a_mended_optimizer_resumes(tmp_path: Path) -> None:
    def trainer() -> tuple[tf.Trainer, SoftPromptCallback]:
        model = zoo.build("bert", "sequence")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        given = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step))}
        return training.prompted(tmp_path, model, "sequence", METHODS["prefix"], given=given, **SAVING)

    whole, callback = trainer()
    whole.train()
    resumed, other = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.equal(training.trained(other), training.trained(callback))


# --- what a checkpoint is ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_small_and_holds_no_model(run: Run) -> None:
    folder = run.folder / "checkpoint-4"
    files = {file.name for file in folder.iterdir()}
    mine = {"soft_prompt.json", "soft_prompt.safetensors", LIVE, "model.safetensors.index.json"}
    trainers = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    assert files == mine | trainers
    assert training.bits(folder) < 2 * 4 * run.numbers + 3500
    assert (folder / "optimizer.pt").stat().st_size < 5000
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_a_checkpoint_loads_as_a_prompt(run: Run) -> None:
    model = zoo.build("llama")
    with softhooks.load(model, run.folder / "checkpoint-4"), torch.no_grad():
        assert torch.equal(model(zoo.text()).logits, run.logits)


@pytest.mark.parametrize(
    "cls", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification"]
)
def test_nobody_takes_a_checkpoint_for_a_model(run: Run, cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A default Llama has seven billion parameters: it must stop before the first of them is made.
    config = zoo.build("llama").config
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *args, **kwargs: pytest.fail("a model was being built"))
    for folder in ("checkpoint-4", "saved"):
        with pytest.raises((ValueError, OSError, KeyError)):
            getattr(tf, cls).from_pretrained(run.folder / folder)
        if not cls.startswith("Auto"):
            with pytest.raises((ValueError, OSError, KeyError)):
                getattr(tf, cls).from_pretrained(run.folder / folder, config=config)


def test_the_model_saves_itself_again_when_the_prompt_is_removed(tmp_path: Path) -> None:
    model = zoo.build("llama")
    other = softhooks.attach(model, PromptTuning(3), "other")
    _, callback = training.prompted(tmp_path, model, "causal", METHODS["prompt"])
    assert callback.soft_prompt is not None
    callback.soft_prompt.remove()
    model.save_pretrained(tmp_path / "other")
    assert torch.equal(load_file(tmp_path / "other" / TENSORS)["prompt.embeddings"], other.embeddings())
    with softhooks.disabled(model):
        model.save_pretrained(tmp_path / "whole")
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(training.base_of(model)) <= set(saved)
    other.remove()
    model.save_pretrained(tmp_path / "bare")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert training.equal(again.state_dict(), model.state_dict())


# --- checkpoints of something else ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "words"),
    [
        (PromptTuning(4, placement="after_first"), "default", "placement"),
        (PrefixTuning(4), "default", "prefix_tuning"),
        (PromptTuning(5), "default", "num_virtual_tokens"),
        (PromptTuning(4), "other", "default"),
    ],
    ids=["options", "method", "length", "name"],
)
def test_a_checkpoint_of_another_prompt_is_refused(
    run: Run, tmp_path: Path, method: Method, name: str, words: str
) -> None:
    model = zoo.build("llama")
    trainer = training.make(tmp_path, model, "causal", [SoftPromptCallback(method, name=name)], **SAVING)
    before = snapshot(model)
    with pytest.raises(TrainerError, match=words):
        trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-2"))
    assert not [key for key in differences(before, snapshot(model)) if key.startswith("tensor")]


def test_a_checkpoint_of_another_base_is_refused(run: Run, tmp_path: Path) -> None:
    trainer, _ = training.prompted(tmp_path, zoo.build("llama", seed=7), "causal", METHODS["prompt"], **SAVING)
    with pytest.raises(TrainerError, match="base model"):
        trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-2"))


def test_a_checkpoint_of_a_whole_model_is_refused(run: Run, tmp_path: Path) -> None:
    folder = copy_of(run.folder / "checkpoint-2", tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    (folder / LIVE).unlink()
    save_file(
        {name: value.clone() for name, value in zoo.build("llama").state_dict().items()}, folder / "model.safetensors"
    )
    trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], **SAVING)
    trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-2"))
    with training.logged(), pytest.raises(TrainerError, match="has no prompt named 'default'"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_damaged_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    folder = copy_of(run.folder / "checkpoint-2", tmp_path)
    tensors = load_file(folder / LIVE)
    tensors["soft_prompt.default.encoder.embeddings"] = torch.zeros(4, 31)
    save_file(tensors, folder / LIVE)
    trainer, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", METHODS["prompt"], **SAVING)
    before = training.trained(callback)
    with pytest.raises(TrainerError, match=r"\[4, 31\]"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert training.equal(training.trained(callback), before)


def test_the_base_can_still_be_loaded_into(tmp_path: Path) -> None:
    model, other = zoo.build("llama"), zoo.build("llama", seed=3)
    training.prompted(tmp_path, model, "causal", METHODS["prompt"])
    model.load_state_dict(other.state_dict(), strict=False)
    assert training.equal(training.base_of(model), training.base_of(other))
    model.load_state_dict(model.state_dict())


# --- on top of LoRA ---------------------------------------------------------------------------------------------------


def lora(arch: str = "llama", head: str = "causal") -> Any:
    peft = pytest.importorskip("peft")
    kinds = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS"}
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, task_type=kinds[head], target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(zoo.build(arch, head), config)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # a model from a config has no name
@pytest.mark.filterwarnings("ignore:Unable to fetch remote file")
@pytest.mark.parametrize(("head", "method"), [("causal", "prompt"), ("causal", "prefix"), ("sequence", "prompt")])
def test_a_prompt_on_top_of_lora(tmp_path: Path, head: str, method: str) -> None:
    model = lora(head=head)
    before = snapshot(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    base = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    scores = iter([1.0, 5.0, 2.0, 3.0])
    keeper = Keeper()

    def trainer(model: Any, *callbacks: tf.TrainerCallback, **options: Any) -> tuple[tf.Trainer, SoftPromptCallback]:
        callback = SoftPromptCallback(METHODS[method], trainable="*lora_*")
        made = training.make(tmp_path, model, head, [callback, *callbacks], **{**SAVING, "save_steps": 1, **options})
        return made, callback

    whole, callback = trainer(model, keeper)
    start = training.trained(callback)
    assert any("lora_" in name for name in start)
    assert any("encoder" in name for name in start)
    whole.train()
    after = training.trained(callback)
    assert not [name for name in after if torch.equal(after[name], start[name])]
    assert any("heads" in name for name in after) == (head == "sequence")
    own = {name: value for name, value in model.state_dict().items() if name in base}
    assert training.equal(own, base)

    again = lora(head=head)
    resumed, other = trainer(again)
    training.spoil(other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(keep(again, resumed.optimizer), keeper.kept[4])

    best = lora(head=head)
    chosen, third = trainer(
        best, load_best_model_at_end=True, metric_for_best_model="score", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    chosen.compute_metrics = lambda prediction: {"score": next(scores)}
    chosen.train()
    assert training.equal(training.trained(third), keeper.kept[2][0])
    assert third.report is not None

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(before[f"tensor {name}"][2])
    remove_all()
    remaining = differences(before, snapshot(model))
    assert not [name for name in remaining if not name.endswith(("[training]", "config", "[_is_accelerate_prepared]"))]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags

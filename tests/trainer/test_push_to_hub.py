"""The Trainer's own ways to push: they push the prompt and its card, and never the weights of the base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import yaml
import zoo
from hub_api import TOKEN, Repository
from hub_stand_in import HubStandIn
from safetensors.torch import load
from untouched import remove_all, same_bits

import softhooks
from softhooks import PromptTuning, SoftPromptCallback
from softhooks.formats.softhooks_files import DESCRIPTION, LIVE, TENSORS
from softhooks.model_card.card import FILE
from softhooks.model_card.curves import PICTURE

REPO, BASE = "me/run", "org/base"
PUSH: dict[str, Any] = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN}
PROMPT = {DESCRIPTION, TENSORS}
OTHERS = {".gitattributes", "training_args.bin"}


class WaitForPush(tf.TrainerCallback):
    """Waits for the push of each checkpoint, so that the Trainer does not leave out the next one."""

    trainer: Any = None

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.trainer._finish_current_push()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def trainer_of(folder: Path, hub: HubStandIn, **options: Any) -> tuple[tf.Trainer, SoftPromptCallback]:
    """A Trainer of a prompt for a base model on the Hub."""
    zoo.build("llama").save_pretrained(folder / "base")
    hub.add(BASE, folder / "base")
    wait = WaitForPush()
    trainer, callback = training.prompted(
        folder / "out", tf.AutoModelForCausalLM.from_pretrained(BASE), "causal", PromptTuning(4), wait, **options
    )
    wait.trainer = trainer
    return trainer, callback


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(zoo.text()).logits


def tensors(repository: Repository) -> set[str]:
    """The names of all tensors in all commits."""
    files = [(name, data) for commit in repository.commits.values() for name, data in commit.items()]
    return {key for name, data in files if name.endswith(".safetensors") for key in load(data)}


def require_no_base(repository: Repository) -> None:
    """The repository has never contained a weight of the base, or a file of a whole model."""
    assert tensors(repository) <= {"prompt.embeddings", *own_names()}
    names = {name for commit in repository.commits.values() for name in commit}
    assert not {"config.json", "model.safetensors", "pytorch_model.bin"} & names


def own_names() -> set[str]:
    """The names of the live parameters, and of the description next to them."""
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        return {name for name, _ in prompt.named_parameters()} | {"soft_prompt.default.description"}


def test_a_run_that_pushes_its_checkpoints(hub: HubStandIn, tmp_path: Path) -> None:
    trainer, callback = trainer_of(
        tmp_path, hub, **PUSH, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    trainer._finish_current_push()
    repository = hub.repositories[REPO]
    pushed = {repository.messages[sha]: files for sha, files in repository.commits.items()}
    assert set(pushed) == {"initial commit", "Training in progress, step 2", "Training in progress, step 4"}
    for step in (2, 4):
        files = pushed[f"Training in progress, step {step}"]
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        assert set(files) >= PROMPT
        assert files[TENSORS] == (checkpoint / TENSORS).read_bytes()
        assert files[LIVE] == (checkpoint / LIVE).read_bytes()
    expected = answer(trainer.model)
    trainer.push_to_hub()
    require_no_base(repository)
    assert set(repository.files()) >= {*PROMPT, *OTHERS, FILE}
    assert same_bits(answer(softhooks.load_model(REPO)), expected)
    card = repository.files()[FILE].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["library_name"], header["base_model"]) == ("softhooks", BASE)
    assert set(header["tags"]) == {"generated_from_trainer", "soft-prompt", "prompt-tuning"}
    assert "`input_ids`, `attention_mask`, `labels`" in card
    assert "| `learning_rate` | `0.02` |" in card
    assert f"| 4 | {training.losses(trainer)[-1]:.4g} |" in card
    assert callback.report is not None
    assert f"{callback.report.tensors} parameters and buffers of the base model" in card
    assert hub.repositories[BASE].refs["main"] in card
    assert ("training_curves" in card) is (PICTURE in repository.files())


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_from_which_training_can_resume(strategy: str, hub: HubStandIn, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": strategy}
    trainer, callback = trainer_of(tmp_path, hub, **PUSH, **options)
    trainer.train()
    trainer._finish_current_push()
    repository = hub.repositories[REPO]
    require_no_base(repository)
    folder = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-4"
    inside = {
        name.removeprefix(f"{folder}/"): data for name, data in repository.files().items() if name.startswith(folder)
    }
    (tmp_path / "downloaded" / "checkpoint-4").mkdir(parents=True)
    for name, data in inside.items():
        (tmp_path / "downloaded" / "checkpoint-4" / name).write_bytes(data)
    trained = training.trained(callback)
    resumed, again = training.prompted(tmp_path / "again", zoo.build("llama"), "causal", PromptTuning(4))
    resumed.train(resume_from_checkpoint=str(tmp_path / "downloaded" / "checkpoint-4"))
    assert all(same_bits(value, trained[name]) for name, value in training.trained(again).items())


def test_save_model_pushes_too(hub: HubStandIn, tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, hub, **PUSH)
    trainer.train()
    trainer.save_model()
    repository = hub.repositories[REPO]
    require_no_base(repository)
    assert "Model save" in repository.messages.values()
    assert set(repository.files()) >= {*PROMPT, *OTHERS, FILE}


def test_a_push_that_training_arguments_did_not_ask_for(hub: HubStandIn, tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, hub, hub_model_id=REPO, hub_token=TOKEN)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(commit_message="mine", tags=["films"], license="mit", dataset="sst2")
    repository = hub.repositories[REPO]
    require_no_base(repository)
    assert "mine" in repository.messages.values()
    card = repository.files()[FILE].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "mit"
    assert {"films", "soft-prompt"} <= set(header["tags"])
    assert "| `eval_loss` |" in card
    assert callback.soft_prompt is not None
    callback.soft_prompt.push_to_hub("me/other", token=TOKEN)  # the run is known to the prompt, too
    own = hub.repositories["me/other"].files()
    assert set(own) == {".gitattributes", *PROMPT, FILE, *({PICTURE} & set(own))}
    assert "| `learning_rate` | `0.02` |" in own[FILE].decode()


def test_save_pretrained_pushes_while_the_callback_trains(hub: HubStandIn, tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, hub)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "prompt", push_to_hub=True, repo_id=REPO, token=TOKEN)
    repository = hub.repositories[REPO]
    require_no_base(repository)
    assert set(repository.files()) >= {*PROMPT, FILE}


def test_the_trainer_writes_its_own_card_once_the_prompt_is_removed(hub: HubStandIn, tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path, hub, hub_model_id=REPO, hub_token=TOKEN)
    trainer.train()
    trainer.remove_callback(callback)
    assert callback.soft_prompt is not None
    callback.soft_prompt.remove()
    trainer.push_to_hub()
    card = hub.repositories[REPO].files()[FILE].decode()
    assert "softhooks" not in card
    assert "model.safetensors" in hub.repositories[REPO].files()


@pytest.mark.slow
def test_with_environment_variables_in_a_process_of_its_own(hub: HubStandIn, tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    hub.add(BASE, tmp_path / "base")
    support = Path(__file__).parents[1] / "support"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join([str(support), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = [sys.executable, str(support / "processes" / "on_the_hub.py"), str(tmp_path / "out"), BASE, REPO]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert "the same" in done.stdout, done.stderr
    require_no_base(hub.repositories[REPO])
    assert (
        json.loads(hub.repositories[REPO].files()[DESCRIPTION])["base"]["revision"]
        == hub.repositories[BASE].refs["main"]
    )

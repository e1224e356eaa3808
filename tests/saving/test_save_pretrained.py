"""`model.save_pretrained` and a Trainer without a callback write the prompts while prompts are on."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import training
import transformers as tf
import zoo
from hub_api import TOKEN
from hub_stand_in import HubStandIn
from safetensors.torch import load_file
from untouched import same_bits

import softhooks
from softhooks import PrefixTuning, PromptMismatchError, PromptTuning, PTuning, SoftPromptCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*trained with this prompt")

PROMPT = {"soft_prompt.json", "soft_prompt.safetensors"}
CASES = [
    zoo.Case("llama", "causal"),
    zoo.Case("gpt2", "causal"),
    zoo.Case("bert", "sequence"),
    zoo.Case("t5", "seq2seq"),
]


def answer(model: Any, case: zoo.Case = CASES[0]) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(model.eval()(**zoo.inputs(case, zoo.text())))


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def lora(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


# --- save_pretrained of the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4, projection=True)], ids=lambda m: m.kind)
def test_save_pretrained_of_the_model_writes_the_prompt(method: Any, case: zoo.Case, tmp_path: Path) -> None:
    model = zoo.build(case.arch, case.head)
    softhooks.attach(model, method)
    expected = answer(model, case)
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == PROMPT
    fresh = zoo.build(case.arch, case.head)
    softhooks.load(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh, case), expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["disabled", "removed", "state_dict"])
def test_the_base_is_saved_clean(way: str, arch: str, tmp_path: Path) -> None:
    model = zoo.build(arch)
    bare, order = answer(model), list(model._modules)
    with softhooks.attach(model, PromptTuning(4)):
        prompted = answer(model)
        if way == "disabled":
            with softhooks.disabled(model):
                model.save_pretrained(tmp_path)
        elif way == "state_dict":
            state = {name: value for name, value in model.state_dict().items() if "soft_prompt" not in name}
            model.save_pretrained(tmp_path, state_dict=state)
        assert same_bits(answer(model), prompted)
    if way == "removed":
        model.save_pretrained(tmp_path)
    assert list(model._modules) == order
    assert "save_pretrained" not in model.__dict__
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "soft_prompt" in name]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(answer(again), bare)


def test_shards_of_the_base_are_clean_too(tmp_path: Path) -> None:
    model = zoo.build("llama")
    bare = answer(model)
    softhooks.attach(model, PromptTuning(4))
    with softhooks.disabled(model):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        state = model.state_dict()
        assert any("soft_prompt" in name for name in state)
        model.save_pretrained(tmp_path / "given", state_dict=state)
    assert "model.safetensors.index.json" in names(tmp_path)
    assert same_bits(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), bare)
    assert same_bits(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "given")), bare)


def test_several_prompts_are_all_written(tmp_path: Path) -> None:
    model = zoo.build("llama")
    expected = {}
    for name in ("de", "default", "en"):
        softhooks.attach(model, PromptTuning(4, init="random"), name)
        expected[name] = answer(model)
    softhooks.activate(model, "de")
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == PROMPT | {f"{name}/{file}" for name in ("de", "en") for file in PROMPT}
    for name, folder in {"default": tmp_path, "de": tmp_path / "de", "en": tmp_path / "en"}.items():
        fresh = zoo.build("llama")
        softhooks.load(fresh, folder)
        torch.testing.assert_close(answer(fresh), expected[name])


def test_without_a_default_the_prompt_that_is_on_is_at_the_top(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4, init="random"), "en")
    model.save_pretrained(tmp_path / "one")
    assert names(tmp_path / "one") == PROMPT
    english = answer(model)
    softhooks.attach(model, PromptTuning(4, init="random"), "de")
    softhooks.activate(model, "en")
    model.save_pretrained(tmp_path / "two")
    assert names(tmp_path / "two") == PROMPT | {f"de/{file}" for file in PROMPT}
    fresh = zoo.build("llama")
    softhooks.load(fresh, tmp_path / "two")
    torch.testing.assert_close(answer(fresh), english)


def test_a_state_dict_that_is_given_is_what_is_written(tmp_path: Path) -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(4))
    kept = prompt.embeddings().detach().clone()
    averaged = {name: value.clone() * (2 if "soft_prompt" in name else 1) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=averaged)
    assert torch.equal(load_file(tmp_path / "soft_prompt.safetensors")["prompt.embeddings"], 2 * kept)
    assert torch.equal(prompt.embeddings(), kept)


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    model.save_pretrained(tmp_path, is_main_process=False)
    model.save_pretrained(tmp_path, False)
    assert not names(tmp_path)
    over_lora = lora(zoo.build("llama"))
    softhooks.attach(over_lora, PromptTuning(4))
    over_lora.save_pretrained(tmp_path, False)  # PEFT's second argument is another one
    assert names(tmp_path) >= PROMPT


def test_what_was_written_instead_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("softhooks")]
    assert len(said) == 1
    assert "softhooks.disabled(model)" in said[0]
    assert str(tmp_path) in said[0]


def test_a_copy_saves_its_own_prompt(tmp_path: Path) -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(4))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.startswith("soft_prompt."):
                parameter.mul_(2)
    twin.save_pretrained(tmp_path)
    written = load_file(tmp_path / "soft_prompt.safetensors")["prompt.embeddings"]
    assert torch.equal(written, 2 * prompt.embeddings())


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_the_prompt_and_a_card(hub: HubStandIn, tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "other.txt").write_text("not written by this call")
    model.save_pretrained(tmp_path / "prompt", push_to_hub=True, repo_id="me/prompt", token=TOKEN, commit_message="hi")
    repository = hub.repositories["me/prompt"]
    assert set(repository.files()) == {*PROMPT, "README.md", ".gitattributes"}
    assert "# prompt" in repository.files()["README.md"].decode()
    assert "hi" in repository.messages.values()


def test_push_to_hub_keeps_the_user_s_own_card(hub: HubStandIn, tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "README.md").write_text("# mine")
    model.save_pretrained(tmp_path / "prompt", push_to_hub=True, token=TOKEN)
    assert (tmp_path / "prompt" / "README.md").read_text() == "# mine"
    assert hub.repositories["me/prompt"].files()["README.md"] == b"# mine"


def test_push_to_hub_of_the_model_uploads_the_prompt(hub: HubStandIn) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    model.push_to_hub("me/prompt", token=TOKEN)
    assert set(hub.repositories["me/prompt"].files()) == {*PROMPT, "README.md", ".gitattributes"}


# --- what else is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_lora_under_a_prompt_is_written_with_it(adapter: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(zoo.build("llama"), config, adapter_name=adapter)
    softhooks.attach(model, PromptTuning(4), trainable="*lora_*")
    expected = answer(model)
    model.save_pretrained(tmp_path)
    assert names(tmp_path) >= PROMPT
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    assert not [name for name in load_file(folder / "adapter_model.safetensors") if "soft_prompt" in name]
    fresh = peft.PeftModel.from_pretrained(zoo.build("llama"), folder)
    softhooks.load(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh), expected)


def test_an_adapter_that_the_model_holds_is_written_with_the_prompt(tmp_path: Path) -> None:
    model = zoo.build("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    softhooks.attach(model, PromptTuning(4), trainable="*lora_*")
    expected = answer(model)
    model.save_pretrained(tmp_path)
    assert names(tmp_path) >= PROMPT | {"adapter_model.safetensors"}
    fresh = zoo.build("llama")
    fresh.load_adapter(str(tmp_path))
    softhooks.load(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh), expected)


def test_parameters_of_the_base_that_train_are_not_lost(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4), trainable="*norm*")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    fresh = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained with this prompt"):
        softhooks.load(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh), expected)


# --- a Trainer without a callback -------------------------------------------------------------------------------------


def run(folder: Path, model: Any, resume: bool = False, **options: Any) -> tf.Trainer:
    trainer = training.make(folder, model, "causal", [], max_steps=6, save_strategy="steps", save_steps=3, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


@pytest.mark.parametrize(
    "method", [PromptTuning(4), PTuning(4), PrefixTuning(4, projection=True)], ids=lambda m: m.kind
)
@pytest.mark.parametrize("with_lora", [False, True], ids=["base", "lora"])
def test_a_trainer_without_a_callback_saves_and_resumes(method: Any, with_lora: bool, tmp_path: Path) -> None:
    def made() -> Any:
        model = zoo.build("llama")
        torch.manual_seed(3)
        model = lora(model) if with_lora else model
        softhooks.attach(model, method, trainable="*lora_*" if with_lora else ())
        return model

    model = made()
    trainer = run(tmp_path, model)
    expected = answer(model)
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-6"):
        assert names(folder) >= PROMPT
        assert "model.safetensors" not in names(folder)
        fresh = zoo.build("llama")
        if with_lora:
            fresh = peft.PeftModel.from_pretrained(fresh, folder)
        softhooks.load(fresh, folder)
        torch.testing.assert_close(answer(fresh), expected)
    other = made()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)  # all of it must come from the checkpoint
    run(tmp_path, other, resume=True)
    assert same_bits(answer(other), expected)


def test_a_trainer_without_a_callback_loads_its_best(tmp_path: Path) -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(4))
    trainer = run(
        tmp_path, model, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-3"
    assert torch.equal(load_file(best / "soft_prompt.safetensors")["prompt.embeddings"], prompt.embeddings())


def test_a_run_of_another_prompt_is_not_resumed(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    run(tmp_path, model)
    others = {
        "length": (PromptTuning(5), "default"),
        "kind": (PrefixTuning(4), "default"),
        "name": (PromptTuning(4), "en"),
    }
    for method, name in others.values():
        other = zoo.build("llama")
        softhooks.attach(other, method, name)
        with pytest.raises(PromptMismatchError, match=r"soft_prompt\.default"):
            run(tmp_path, other, resume=True)


def test_a_callback_takes_up_what_a_trainer_without_one_has_written(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4))
    run(tmp_path, model)
    expected = answer(model)
    other = zoo.build("llama")
    trainer, _ = training.prompted(tmp_path, other, "causal", PromptTuning(4), max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_bits(answer(other), expected)


def test_beside_a_callback_the_base_is_saved_clean(tmp_path: Path) -> None:
    model = zoo.build("llama")
    bare = answer(model)
    trainer = training.make(tmp_path, model, "causal", [SoftPromptCallback(PromptTuning(4))])
    trainer.train()
    with softhooks.disabled(model):
        model.save_pretrained(tmp_path / "base")
    assert same_bits(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")), bare)
    trainer.save_model(str(tmp_path / "saved"))
    assert names(tmp_path / "saved") >= PROMPT
    assert "model.safetensors" not in names(tmp_path / "saved")


def test_a_state_dict_goes_back_into_the_model_that_gave_it(tmp_path: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(4), "en")
    softhooks.attach(model, PTuning(4))
    expected = answer(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_bits(answer(model), expected)

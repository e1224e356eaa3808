"""`load_model`: the base model and its prompt in one line, and nothing that a file could choose except weights."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import markdown
import pytest
import tokens
import torch
import transformers as tf
import zoo
from hub_api import TOKEN
from hub_stand_in import HubStandIn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from untouched import remove_all, same_bits

import softhooks
from softhooks import CheckpointError, OptionError, PrefixTuning, PromptMismatchError, PromptTuning
from softhooks.base_model.auto_classes import AUTO_CLASSES, auto_class_of
from softhooks.formats.softhooks_files import FORMAT, TENSORS

BASE, PROMPT = "org/base", "me/prompt"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def publish(hub: HubStandIn, folder: Path, arch: str = "llama", head: str = "causal", method: Any = None) -> Any:
    """Put a base model on the Hub, load it from there, attach a prompt, and push the prompt."""
    zoo.build(arch, head).save_pretrained(folder / "base")
    hub.add(BASE, folder / "base")
    auto = auto_class_of(type(zoo.build(arch, head)).__name__)
    assert auto is not None
    torch.manual_seed(0)  # for a new head
    model = getattr(tf, auto.name).from_pretrained(BASE)
    prompt = softhooks.attach(model.eval(), method or PromptTuning(4))
    prompt.push_to_hub(PROMPT, token=TOKEN)
    return prompt


@torch.no_grad()
def answer(model: Any, arch: str = "llama", head: str = "causal") -> torch.Tensor:
    return zoo.main_output(model(**zoo.inputs(zoo.Case(arch, head), zoo.text())))


def changed(folder: Path, target: Path, **base: Any) -> Path:
    """A copy of a saved prompt with other facts about its base model."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        description = json.loads(file.metadata()[FORMAT])
    description["base"] |= base
    target.mkdir()
    save_file(load_file(folder / TENSORS), target / TENSORS, {FORMAT: json.dumps(description)})
    return target


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "head", "method"),
    [
        ("llama", "causal", PromptTuning(4)),
        ("bert", "sequence", PrefixTuning(4)),
        ("bert", "tokens", PromptTuning(4)),
        ("t5", "seq2seq", PromptTuning(4)),
    ],
)
def test_one_line_loads_the_base_and_the_prompt(
    hub: HubStandIn, tmp_path: Path, arch: str, head: str, method: Any
) -> None:
    prompt = publish(hub, tmp_path, arch, head, method)
    expected = answer(prompt.model, arch, head)
    model = softhooks.load_model(PROMPT)
    assert type(model) is type(prompt.model)
    assert not model.training
    assert same_bits(answer(model, arch, head), expected)
    with softhooks.disabled(model), softhooks.disabled(prompt.model):
        assert head != "causal" or same_bits(answer(model), answer(prompt.model))


def test_the_base_is_loaded_at_the_revision_of_the_training(hub: HubStandIn, tmp_path: Path) -> None:
    prompt = publish(hub, tmp_path)
    commit = hub.repositories[BASE].refs["main"]
    zoo.build("llama", seed=3).save_pretrained(tmp_path / "newer")
    newer = hub.add(BASE, tmp_path / "newer")
    model = softhooks.load_model(PROMPT)
    assert same_bits(answer(model), answer(prompt.model))
    asked = [path for _, path in hub.requests if f"{newer}/" in path]
    assert not asked
    assert prompt.to_stored().base.revision == commit


def test_a_base_at_another_revision_is_refused(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, tmp_path)
    same_weights = hub.repositories[BASE].commit({"note.txt": b"another commit"})
    monkeypatch.setattr(importlib.import_module("softhooks.load_model"), "_commits_of", lambda *_: [same_weights])
    with pytest.raises(PromptMismatchError, match="another revision") as caught:
        softhooks.load_model(PROMPT)
    assert same_weights in str(caught.value)


def test_other_weights_are_refused(hub: HubStandIn, tmp_path: Path) -> None:
    publish(hub, tmp_path)
    zoo.build("llama", seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(PromptMismatchError, match="its weights are different"):
        softhooks.load_model(PROMPT, base=tmp_path / "other")
    model = softhooks.load_model(PROMPT, base=tmp_path / "other", strict=False)
    assert softhooks.attach(model, PromptTuning(2), "second").is_attached


def test_options_of_from_pretrained_are_passed_on(hub: HubStandIn, tmp_path: Path) -> None:
    publish(hub, tmp_path)
    model = softhooks.load_model(PROMPT, name="mine", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    with softhooks.rows(model, ["mine", None]):
        answer(model)


def test_a_prompt_and_a_base_in_directories(tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    softhooks.attach(model, PromptTuning(4)).save_pretrained(tmp_path / "prompt")
    assert same_bits(answer(softhooks.load_model(tmp_path / "prompt")), answer(model))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="base=") as caught:
        softhooks.load_model(tmp_path / "prompt")
    assert str(tmp_path / "base") in str(caught.value)
    assert same_bits(answer(softhooks.load_model(tmp_path / "prompt", base=tmp_path / "moved")), answer(model))


def test_a_peft_adapter(tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    softhooks.attach(model, PromptTuning(4)).save_pretrained(tmp_path / "adapter", as_peft=True)
    assert same_bits(answer(softhooks.load_model(tmp_path / "adapter")), answer(model))


# --- what a file may not choose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"trust_remote_code": True}, {"trust_remote_code": False}, {"use_safetensors": False}]
)
def test_code_and_pickles_cannot_be_asked_for(option: dict[str, Any], hub: HubStandIn) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        softhooks.load_model(PROMPT, **option)
    assert not [path for _, path in hub.requests if PROMPT in path]


@pytest.mark.parametrize(
    "name",
    ["Trainer", "PreTrainedModel", "os.system", "AutoModelForCausalLM", "__class__", "LlamaForCausalLM ", "x" * 999],
)
def test_a_class_that_is_not_in_the_list_is_refused(name: str, hub: HubStandIn, tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path / "prompt")
    given = changed(tmp_path / "prompt", tmp_path / "given", name_or_path=BASE, **{"class": name})
    with pytest.raises(CheckpointError, match="none of transformers' Auto classes"):
        softhooks.load_model(given)
    assert not [path for _, path in hub.requests if BASE in path]


def test_every_class_in_the_list_exists_in_transformers() -> None:
    for auto in AUTO_CLASSES:
        assert hasattr(getattr(tf, auto.name), "from_pretrained")
        assert auto.classes()
    assert auto_class_of("", "SEQ_CLS") is not None
    assert auto_class_of("", "") is None
    assert auto_class_of("", None) is None


@pytest.mark.parametrize("path", ["/etc", "../base", "", "a/b/c", "https://example.com/x", "org/base\n"])
def test_a_prompt_from_the_hub_names_a_repository_and_not_a_path(path: str, hub: HubStandIn, tmp_path: Path) -> None:
    publish(hub, tmp_path)
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / TENSORS).write_bytes(hub.repositories[PROMPT].files()[TENSORS])
    hub.add(PROMPT, changed(tmp_path / "prompt", tmp_path / "given", name_or_path=path))
    with pytest.raises(CheckpointError, match="does not name a base model that can be loaded"):
        softhooks.load_model(PROMPT)


def test_code_in_the_base_s_repository_is_not_run(hub: HubStandIn, tmp_path: Path) -> None:
    publish(hub, tmp_path)
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / TENSORS).write_bytes(hub.repositories[PROMPT].files()[TENSORS])
    for number, kind in enumerate(["llama", "evil"]):
        config = json.loads((tmp_path / "base" / "config.json").read_text()) | {
            "model_type": kind,
            "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
        }
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        (tmp_path / "base" / "evil.py").write_text("raise SystemExit('this code was run')")
        hub.add(f"org/evil{number}", tmp_path / "base")
        given = changed(tmp_path / "prompt", tmp_path / kind, name_or_path=f"org/evil{number}", revision=None)
        if kind == "llama":  # transformers has its own class for this type
            softhooks.load_model(given)
        else:
            with pytest.raises(CheckpointError, match="cannot be loaded"):
                softhooks.load_model(given)
    assert not hub.asked("GET", "evil.py")


def test_a_config_of_another_model_is_refused_before_its_weights_are_downloaded(
    hub: HubStandIn, tmp_path: Path
) -> None:
    publish(hub, tmp_path)
    zoo.build("gpt2").save_pretrained(tmp_path / "gpt2")
    hub.add("org/gpt2", tmp_path / "gpt2")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="another model class") as caught:
        softhooks.load_model(PROMPT, base="org/gpt2")
    assert "LlamaForCausalLM" in str(caught.value)
    assert "gpt2" in str(caught.value)
    assert not hub.asked("GET", "model.safetensors")


def test_weights_in_a_pickle_are_not_read(hub: HubStandIn, tmp_path: Path) -> None:
    publish(hub, tmp_path)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    hub.add("org/pickle", tmp_path / "base")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        softhooks.load_model(PROMPT, base="org/pickle")
    assert not hub.asked("GET", "pytorch_model.bin")


def test_the_block_of_the_documentation_that_needs_the_hub(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = [
        block for block in markdown.blocks("docs/saving.md", "python") if block.comment == "not run: needs the Hub"
    ]
    zoo.build("llama").save_pretrained(tmp_path / "base")
    hub.add(BASE, tmp_path / "base")
    models = [tf.AutoModelForCausalLM.from_pretrained(BASE) for _ in range(2)]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    names = {"softhooks": softhooks, "torch": torch, "model": models[0], "fresh_model": models[1]}
    exec(compile(block.code, str(block), "exec"), names)
    assert capsys.readouterr().out.strip() == hub.repositories["me/my-prompt"].refs["main"]


def test_the_code_of_a_card_loads_the_prompt(hub: HubStandIn, tmp_path: Path) -> None:
    prompt = publish(hub, tmp_path)
    tokens.merged().save_pretrained(tmp_path / "base")
    hub.repositories[BASE].commits[hub.repositories[BASE].refs["main"]] |= {
        path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()
    }
    card = hub.repositories[PROMPT].files()["README.md"].decode()
    code = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert same_bits(answer(names["model"].eval()), answer(prompt.model))
    line = re.findall(r"`model = (softhooks\.load_model.*?)`", card)[0]
    assert same_bits(answer(eval(line, names)), answer(prompt.model))

"""`softhooks convert` from the command line: both directions, several prompts, complete or not at all, malicious files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner
from untouched import remove_all

import softhooks
from softhooks import (
    Cartridge,
    ContextAwarePromptTuning,
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    SoftHooksError,
)
from softhooks.cli import app
from softhooks.formats.files import read_tensors, write_tensors
from softhooks.formats.softhooks_files import DESCRIPTION, FORMAT, TENSORS
from softhooks.method import Method

P = 4
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
TASK_IDS = torch.tensor([1, 0])
runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})

METHODS: dict[str, Callable[[], Method]] = {
    "prompt": lambda: PromptTuning(P),
    "p-tuning": lambda: PTuning(P),
    "prefix": lambda: PrefixTuning(P),
    "prefix with its MLP": lambda: PrefixTuning(P, projection=True, hidden_size=8),
    "P-tuning v2": lambda: PTuningV2(P),
    "several tasks": lambda: MultitaskPromptTuning(P, tasks=2, rank=2),
    "context": lambda: ContextAwarePromptTuning(context_ids=[5, 6, 7, 8], token_types=[1, 2, 3, 4]),
    "cartridge": lambda: Cartridge(P, document=range(5, 15), frozen_slots=1, distill=False),
}
CASES = [
    *[("llama", "causal", kind) for kind in METHODS],
    *[("gpt2", "causal", kind) for kind in ("prompt", "prefix")],
    *[("llama", "sequence", kind) for kind in ("prompt", "p-tuning")],
    *[(arch, "seq2seq", "prompt") for arch in zoo.SEQ2SEQ],
]
"""Conversions that need no base model, because the files have all the information."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def run(*arguments: str | Path) -> list[str]:
    """Convert, and return what is printed; an expected error is raised."""
    result = runner.invoke(app.app, ["convert", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@torch.no_grad()
def answer(model: Any, arch: str, head: str, kind: str = "") -> Tensor:
    ids = zoo.text(2, 7)
    extra = {"task_ids": TASK_IDS} if kind == "several tasks" else {}
    with peers.quiet():
        found = zoo.main_output(model(**zoo.inputs(zoo.Case(arch, head), ids), **extra))
    return found[:, -ids.shape[1] :] if head in ("causal", "tokens") else found


def saved(folder: Path, arch: str, head: str, method: Method, kind: str = "", seed: int = 1) -> Tensor:
    """Save a prompt with an effect; return the model's output with it."""
    model = zoo.build(arch, head)
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in prompt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        prompt.save_pretrained(folder)
        return answer(model, arch, head, kind)


def loaded(folder: Path, arch: str, head: str, kind: str = "") -> Tensor:
    model = zoo.build(arch, head)
    with softhooks.load(model, folder):
        return answer(model, arch, head, kind)


def in_peft(folder: Path, arch: str, head: str, kind: str = "") -> Tensor:
    peft = pytest.importorskip("peft")
    with peers.quiet():
        model = peft.PeftModel.from_pretrained(zoo.build(arch, head), str(folder)).eval()
    return answer(model, arch, head, kind)


def base(folder: Path, arch: str, head: str, **changes: Any) -> Path:
    zoo.build(arch, head, **changes).save_pretrained(folder)
    return folder


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    saved(tmp_path / "prompt", "llama", "causal", PromptTuning(P))
    return tmp_path / "prompt"


@pytest.fixture
def adapter(tmp_path: Path, prompt: Path) -> Path:
    run(prompt, tmp_path / "adapter")
    return tmp_path / "adapter"


# --- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "head", "kind"), CASES)
def test_there_and_back_without_a_model(tmp_path: Path, arch: str, head: str, kind: str) -> None:
    expected = saved(tmp_path / "ours", arch, head, METHODS[kind](), kind)
    told = run(tmp_path / "ours", tmp_path / "theirs")
    assert told[0].startswith("default: ")
    assert f"{P} virtual tokens -> {tmp_path / 'theirs'}" in told[0]
    assert sorted(file.name for file in (tmp_path / "theirs").iterdir()) == [CONFIG, ADAPTER]
    torch.testing.assert_close(loaded(tmp_path / "theirs", arch, head, kind), expected, rtol=1e-5, atol=1e-6)
    if head == "sequence" or kind in ("prompt", "several tasks", "context") or arch in zoo.SEQ2SEQ:
        run(tmp_path / "theirs", tmp_path / "back")
    else:
        run(tmp_path / "theirs", tmp_path / "back", "--to", "softhooks")
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == [DESCRIPTION, TENSORS]
    torch.testing.assert_close(loaded(tmp_path / "back", arch, head, kind), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_peft(tmp_path / "theirs", arch, head, kind), expected, **CLOSE)


WITH_BASE: dict[str, tuple[str, str, Callable[[], Method]]] = {
    "adapter": ("llama", "causal", lambda: LlamaAdapter(P, gate_per="layer")),
    "prompt": ("llama", "sequence", lambda: PromptTuning(P)),
    "prefix": ("llama", "sequence", lambda: PrefixTuning(P)),
    "tokens": ("bert", "tokens", lambda: PromptTuning(P)),
    "encoder": ("bert", "sequence", lambda: PrefixTuning(P, shift_positions=True)),
    "encoder-decoder": ("t5", "seq2seq", lambda: PromptTuning(P)),
}


@pytest.mark.parametrize("name", WITH_BASE)
def test_there_and_back_with_the_base(tmp_path: Path, name: str) -> None:
    arch, head, make = WITH_BASE[name]
    expected = saved(tmp_path / "ours", arch, head, make())
    model = base(tmp_path / "model", arch, head)
    run(tmp_path / "ours", tmp_path / "theirs", "--base", model)
    torch.testing.assert_close(in_peft(tmp_path / "theirs", arch, head), expected, **CLOSE)
    run(tmp_path / "theirs", tmp_path / "back", "--base", model)
    torch.testing.assert_close(loaded(tmp_path / "back", arch, head), expected, rtol=1e-5, atol=1e-6)
    told = json.loads((tmp_path / "back" / DESCRIPTION).read_text())
    assert told["base"]["class"] == json.loads((tmp_path / "ours" / DESCRIPTION).read_text())["base"]["class"]
    assert told["base"]["stacks"] == json.loads((tmp_path / "ours" / DESCRIPTION).read_text())["base"]["stacks"]


@pytest.mark.parametrize("name", ["adapter", "prefix", "tokens", "encoder"])
def test_the_base_is_asked_for_where_files_of_peft_leave_it_open(tmp_path: Path, name: str) -> None:
    arch, head, make = WITH_BASE[name]
    saved(tmp_path / "ours", arch, head, make())
    run(tmp_path / "ours", tmp_path / "theirs", "--base", base(tmp_path / "model", arch, head))
    with pytest.raises(SoftHooksError, match=r"--base"):
        run(tmp_path / "theirs", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_several_prompts_of_a_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(zoo.build("llama"), config)
    theirs.add_adapter("de", config)
    with torch.no_grad():
        for encoder in theirs.prompt_encoder.values():
            encoder.embedding.weight.normal_(std=0.5)
    with peers.quiet():
        theirs.save_pretrained(tmp_path / "adapters")
    told = run(tmp_path / "adapters", tmp_path / "prompts")
    assert [line.split(":")[0] for line in told] == ["default", "de"]
    assert sorted(file.name for file in (tmp_path / "prompts").iterdir()) == ["de", DESCRIPTION, TENSORS]
    run(tmp_path / "prompts", tmp_path / "back")
    for name, folder in (("default", "."), ("de", "de")):
        theirs.set_adapter(name)
        expected = answer(theirs.eval(), "llama", "causal")
        for kind in ("prompts", "back"):
            torch.testing.assert_close(loaded(tmp_path / kind / folder, "llama", "causal"), expected, **CLOSE)


def test_a_trainers_checkpoint_over_lora_is_a_prompt_beside_an_adapter(tmp_path: Path, prompt: Path) -> None:
    """The LoRA next to the prompt, and in other folders, is in PEFT's format already."""
    (prompt / CONFIG).write_text('{"peft_type": "LORA"}')
    (prompt / "other").mkdir()
    (prompt / "other" / CONFIG).write_text('{"peft_type": "LORA"}')
    assert len(run(prompt, tmp_path / "out")) == 1
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["peft_type"] == "PROMPT_TUNING"


def test_what_was_trained_beside_a_prompt_is_named(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(P), trainable="*norm*") as prompt:
        prompt.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match=r"5 parameters of the base (.|\n)*nor the converted file contains them"):
        run(tmp_path / "ours", tmp_path / "theirs")


def test_it_explains_itself() -> None:
    result = runner.invoke(app.app, ["convert", "--help"])
    assert result.exit_code == 0
    for phrase in (
        "--to",
        "peft|softhooks",
        "--base",
        "Examples",
        "refused",
        "encoder-decoders",
        "Pickle files",
        "LSTM",
        "whole",
    ):
        assert phrase in result.output


# --- refused, and nothing is written ------------------------------------------------------------------------------------

UNEQUAL: dict[str, tuple[str, str, Callable[[], Method], str]] = {
    "another place": ("llama", "causal", lambda: PromptTuning(P, placement="after_first"), "after_first"),
    "three prefixes": ("t5", "seq2seq", lambda: PrefixTuning(P), "encoder"),
    "pooled": ("bert", "sequence", lambda: PromptTuning(P), "classifies the first token"),
    "some layers": ("llama", "causal", lambda: PTuningV2(P, layers=[1]), "every layer"),
    "no windows": ("mistral", "causal", lambda: PrefixTuning(P, windowed=False), "windowed"),
    "questions": ("llama", "qa", lambda: PromptTuning(P), "QuestionAnswering"),
    "an adapter without its base": ("llama", "causal", lambda: LlamaAdapter(P, gate_per="layer"), "--base"),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_what_peft_would_compute_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    arch, head, make, words = UNEQUAL[name]
    saved(tmp_path / "ours", arch, head, make())
    with pytest.raises(SoftHooksError, match=words):
        run(tmp_path / "ours", tmp_path / "theirs")
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def spoiled(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the description in a softhooks file."""

    def spoil(folder: Path) -> None:
        tensors, metadata = read_tensors(folder / TENSORS)
        told = json.loads(metadata[FORMAT])
        change(told)
        write_tensors(folder / TENSORS, tensors, {FORMAT: json.dumps(told)})

    return spoil


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


FALSE: dict[str, Callable[[Path], Any]] = {
    "truncated": cut(TENSORS),
    "empty": lambda folder: (folder / TENSORS).write_bytes(b""),
    "no description": lambda folder: save_file(load_file(folder / TENSORS), folder / TENSORS),
    "not a number": lambda folder: write_tensors(
        folder / TENSORS,
        {name: value.fill_(float("nan")) for name, value in read_tensors(folder / TENSORS)[0].items()},
        read_tensors(folder / TENSORS)[1],
    ),
    "another method": spoiled(lambda told: told.update(method="os.system")),
    "a class that is a function": spoiled(lambda told: told["base"].update({"class": "pipeline"})),
    "a class that is private": spoiled(lambda told: told["base"].update({"class": "__loader__"})),
    "a class that is a path": spoiled(lambda told: told["base"].update({"class": "os.system"})),
    "a class that is a number": spoiled(lambda told: told["base"].update({"class": 3})),
    "no class": spoiled(lambda told: told["base"].pop("class")),
    "no stacks": spoiled(lambda told: told["base"].update(stacks={})),
    "stacks that are a word": spoiled(lambda told: told["base"].update(stacks="text")),
    "a direction that is a word": spoiled(lambda told: told["base"]["stacks"]["text"].update(causal="yes")),
    "runs that are words": spoiled(lambda told: told["base"]["stacks"]["text"].update(self=[["a", "b", "c", "d"]])),
    "runs that are short": spoiled(lambda told: told["base"]["stacks"]["text"].update(self=[[2, 2]])),
    "runs of nothing": spoiled(lambda told: told["base"]["stacks"]["text"].update(self=[[0, 2, 8, 8]])),
    "runs that are true": spoiled(lambda told: told["base"]["stacks"]["text"].update(self=[[True, 2, 8, 8]])),
    "a newer format": spoiled(lambda told: told.update(format_version=99)),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_prompt_is_refused(tmp_path: Path, prompt: Path, name: str) -> None:
    FALSE[name](prompt)
    with pytest.raises(SoftHooksError):
        run(prompt, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["prompt"]


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        told = json.loads((folder / CONFIG).read_text())
        change(told)
        (folder / CONFIG).write_text(json.dumps(told))

    return spoil


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


def pickled(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


FALSE_PEFT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut(ADAPTER), ADAPTER),
    "a pickle": (pickled, "pickle"),
    "no tensors": (lambda folder: (folder / ADAPTER).unlink(), ADAPTER),
    "a config cut short": (cut(CONFIG), CONFIG),
    "a config of lists": (lambda folder: (folder / CONFIG).write_bytes(b"[" * 100_000), CONFIG),
    "LoRA": (config(lambda told: told.update(peft_type="LORA")), "'LORA'"),
    "trainable tokens": (config(lambda told: told.update(peft_type="TRAINABLE_TOKENS")), "'TRAINABLE_TOKENS'"),
    "no kind": (config(lambda told: told.pop("peft_type")), "None"),
    "another length": (config(lambda told: told.update(num_virtual_tokens=99)), "99"),
    "a foreign task": (config(lambda told: told.update(task_type="__class__")), "causal"),
    "not a number": (
        lambda folder: save_file({"prompt_embeddings": torch.full((P, 32), float("nan"))}, folder / ADAPTER),
        "finite",
    ),
}


@pytest.mark.parametrize("name", FALSE_PEFT)
def test_a_false_adapter_is_refused(tmp_path: Path, prompt: Path, adapter: Path, name: str) -> None:
    spoil, words = FALSE_PEFT[name]
    spoil(adapter)
    with pytest.raises(SoftHooksError, match=words):
        run(adapter, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "prompt"]


def test_one_false_prompt_among_several_leaves_nothing(tmp_path: Path, prompt: Path) -> None:
    saved(prompt / "more", "llama", "causal", PromptTuning(P))
    cut(TENSORS)(prompt / "more")
    with pytest.raises(SoftHooksError, match="more"):
        run(prompt, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["prompt"]


FALSE_BASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another model": (lambda folder: base(folder, "gpt2", "causal"), "LlamaForCausalLM|GPT2|gpt2"),
    "another width": (
        lambda folder: base(folder, "llama", "causal", hidden_size=16, head_dim=8),
        "shapes of the prompt",
    ),
    "an empty folder": (lambda folder: folder.mkdir(), "config.json"),
    "no weights": (lambda folder: (base(folder, "llama", "causal") / "model.safetensors").unlink(), "safetensors"),
    "weights cut short": (lambda folder: cut("model.safetensors")(base(folder, "llama", "causal")), "--base"),
    "a config that is none": (
        lambda folder: (base(folder, "llama", "causal") / "config.json").write_text("{"),
        "--base",
    ),
}


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        (name, direction)
        for name in FALSE_BASES
        for direction in ("prompt", "adapter")
        if (name, direction) != ("another model", "adapter")  # rows fit any causal model of their width, as in PEFT
    ],
)
def test_a_false_base_is_refused(tmp_path: Path, prompt: Path, adapter: Path, name: str, direction: str) -> None:
    make, words = FALSE_BASES[name]
    make(tmp_path / "model")
    with pytest.raises(SoftHooksError, match=words):
        run(tmp_path / direction, tmp_path / "out", "--base", tmp_path / "model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "model", "prompt"]


def test_a_pickle_of_a_base_is_not_read(tmp_path: Path, prompt: Path) -> None:
    model = base(tmp_path / "model", "llama", "causal")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SoftHooksError, match="--base"):
        run(prompt, tmp_path / "out", "--base", model)


def test_a_head_of_any_number_of_labels_finds_its_base(tmp_path: Path) -> None:
    """The number of labels is in the prompt, not in a language model's folder."""
    expected = saved(tmp_path / "ours", "llama", "sequence", PrefixTuning(P))
    model = base(tmp_path / "model", "llama", "causal", num_labels=2)  # its weights were drawn in another order
    run(tmp_path / "ours", tmp_path / "theirs", "--no-strict", "--base", model)
    torch.testing.assert_close(loaded(tmp_path / "theirs", "llama", "sequence"), expected, rtol=1e-5, atol=1e-6)


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path, prompt: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link", "prompt"):
        with pytest.raises(SoftHooksError, match="overwrites nothing"):
            run(prompt, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    run(prompt, tmp_path / "empty")
    run(prompt, tmp_path / "deep" / "down" / "below")
    assert loaded(tmp_path / "deep" / "down" / "below", "llama", "causal").shape == (2, 7, 96)


@pytest.mark.parametrize("when", ["write_tensors", "write_json"])
def test_a_conversion_that_is_cut_off_leaves_nothing(
    tmp_path: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*_args: Any) -> None:
        raise Killed

    monkeypatch.setattr(f"softhooks.formats.peft_write.{when}", die)
    with pytest.raises(Killed):
        run(prompt, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["prompt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, prompt: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SoftHooksError, match=r"OUT \(.*\) cannot be written"):
        run(prompt, tmp_path / "file" / "out")


def test_the_same_format_is_refused(tmp_path: Path, prompt: Path, adapter: Path) -> None:
    for folder, to in ((prompt, "softhooks"), (adapter, "peft")):
        with pytest.raises(SoftHooksError, match=rf"--to {to}"):
            run(folder, tmp_path / "out", "--to", to)
    run(prompt, tmp_path / "one", "--to", "peft")
    run(adapter, tmp_path / "two", "--to", "softhooks")


def test_what_is_no_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftHooksError, match=f"{TENSORS} or {CONFIG}"):
        run(tmp_path, tmp_path / "out")
    for arguments in ([str(tmp_path / "gone"), "out"], [str(tmp_path)], [str(tmp_path), "out", "--to", "pickle"]):
        assert runner.invoke(app.app, ["convert", *arguments]).exit_code == 2

"""`softhooks inspect` from the command line: every kind of stored prompt is described, anything else is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damaged_files as files
import on_disk
import pytest
import table
import tokens
import torch
import training
import zoo
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from untouched import remove_all

import softhooks
from softhooks import CheckpointError, LlamaAdapter, PrefixTuning, PromptMismatchError, PromptTuning
from softhooks.backbone.container import CONTAINER
from softhooks.cli import app
from softhooks.cli.prompt_facts import facts_of
from softhooks.cli.prompt_table import show
from softhooks.formats.hub_commit import HubCommit
from softhooks.formats.softhooks_files import DESCRIPTION, LIVE, TENSORS

P = 4
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
HOSTILE = "\x1b[2Ja\nmodel\t[bold]\ud800 \u202e"
runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def run(*arguments: str | Path) -> str:
    """Inspect, and return what is printed; an expected error is raised."""
    result = runner.invoke(app.app, ["inspect", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert not result.stderr or "--model" in arguments  # transformers shows its progress
    return result.stdout


def told(folder: Path) -> dict[str, Any]:
    """The output for scripts, as strict JSON."""
    [one] = json.loads(run(folder, "--json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return dict(one)


def failing(*arguments: str | Path) -> tuple[int, str]:
    """The exit status and the message for a path that cannot be inspected; nothing else is printed."""
    result = runner.invoke(app.app, ["inspect", *map(str, arguments)])
    assert not result.stdout
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stderr


def require_tensors(one: dict[str, Any], held: dict[str, torch.Tensor]) -> None:
    """Check the printed norms of tensors against a file, computed differently."""
    assert [tensor["name"] for tensor in one["tensors"]] == sorted(held)
    for tensor in one["tensors"]:
        numbers = held[tensor["name"]]
        assert tensor["shape"] == list(numbers.shape)
        assert tensor["dtype"] == str(numbers.dtype).removeprefix("torch.")
        if not numbers.numel():
            assert tensor["row_norms"] is None
            continue
        norms = numbers.double().reshape(-1, numbers.shape[-1]).square().sum(1).sqrt()
        assert tensor["row_norms"] == pytest.approx([norms.min().item(), norms.max().item()])
    assert sum(one["parameters"].values()) == sum(tensor.numel() for tensor in held.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix for a BERT classifier, with its head."""
    folder = tmp_path_factory.mktemp("saved")
    with softhooks.attach(zoo.build("bert", "sequence"), PrefixTuning(3, init="random")) as prompt:
        files.stir(prompt)
        prompt.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer checkpoint of a prefix with an MLP; the prompt saved at the end is in `final` next to it."""
    folder = tmp_path_factory.mktemp("run")
    model, method = zoo.build("bert", "sequence"), PrefixTuning(P, projection=True, hidden_size=8)
    trainer, _ = training.prompted(folder, model, "sequence", method, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return folder / "checkpoint-2"


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", table.TABLE, ids=str)
def test_every_method_is_told(tmp_path: Path, entry: table.Entry) -> None:
    arch, head = next((a, h) for a, h in [("llama", "causal"), ("bert", "sequence")] if entry.fits(zoo.Case(a, h)))
    model = zoo.build(arch, head)
    prompt = entry.attach(model, P)
    prompt.save_pretrained(tmp_path)
    one = told(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    for key in ("method", "options", "conventions", "also_trained", "versions", "heads"):
        assert one[key] == description[key]
    assert (one["format"], one["file"], one["live"], one["name"]) == ("softhooks", TENSORS, None, None)
    assert one["class"] == type(prompt.method).__name__
    assert one["num_virtual_tokens"] == prompt.method.num_virtual_tokens
    assert one["base"]["class"] == type(model).__name__
    assert (one["base"]["width"], one["base"]["vocabulary"]) == (32, zoo.VOCABULARY)
    assert one["base"]["stacks"] == description["base"]["stacks"]
    assert one["bytes"] == (tmp_path / TENSORS).stat().st_size
    assert one["parameters"]["heads"] == sum(p.numel() for p in prompt.heads.parameters())
    require_tensors(one, load_file(tmp_path / TENSORS))
    text = run(tmp_path)
    for phrase in (one["class"], one["method"], one["base"]["class"], *(tensor["name"] for tensor in one["tensors"])):
        assert phrase in text


def test_what_people_read(saved: Path) -> None:
    text = run(saved)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == f"{saved}: PrefixTuning, 3 virtual tokens, written by softhooks"
    assert any(line.startswith("options num_virtual_tokens=3, ") and "init='random'" in line for line in lines)
    assert "conventions shift_positions=False, windowed=True" in lines
    assert "base BertForSequenceClassification, without a name, width 32, vocabulary 96" in lines
    assert "text: bidirectional; self attention in 2 layers of 4 heads, keys 8, values 8" in lines
    assert "parameters 384 in the prompt, 99 in heads" in lines
    assert "heads classifier" in lines
    assert "live none" in lines
    norms = next(t["row_norms"] for t in told(saved)["tensors"] if t["name"] == "prompt.text")
    assert f"prompt.text 3 x 128 float32 {norms[0]:.4g} to {norms[1]:.4g}" in lines


def test_an_encoder_decoder_has_two_stacks(tmp_path: Path) -> None:
    softhooks.attach(zoo.build("t5", "seq2seq"), PrefixTuning(P)).save_pretrained(tmp_path)
    text = run(tmp_path)
    assert "encoder: bidirectional; self attention in 2 layers" in text
    assert "decoder: causal; self attention in 2 layers" in text
    assert "cross attention in 2 layers" in text


def test_what_trained_beside_the_prompt_is_said_to_be_missing(tmp_path: Path) -> None:
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(P), trainable=["*norm*"])
    prompt.save_pretrained(tmp_path)
    one = told(tmp_path)
    assert "model.norm.weight" in one["also_trained"]
    assert f"{len(one['also_trained'])} parameters of the base, trained with the prompt" in run(tmp_path)


def test_the_commit_that_a_prompt_was_loaded_from(tmp_path: Path) -> None:
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(P))
    prompt.save_pretrained(tmp_path / "new")
    prompt.loaded_from = HubCommit("me/prompt", "ab" * 20)
    prompt.save_pretrained(tmp_path / "loaded")
    assert told(tmp_path / "new")["loaded_from"] is None
    assert told(tmp_path / "loaded")["loaded_from"] == {"repo_id": "me/prompt", "commit_hash": "ab" * 20}
    assert f"me/prompt on the Hub, commit {'ab' * 20}" in run(tmp_path / "loaded")


def test_a_long_option_is_cut_for_people_and_whole_for_scripts(tmp_path: Path) -> None:
    text = "Is this review positive? " * 20
    with softhooks.attach(zoo.build("llama"), PrefixTuning(P)) as prompt:
        object.__setattr__(prompt.method, "init_text", text)
        prompt.save_pretrained(tmp_path)
    assert told(tmp_path)["options"]["init_text"] == text
    assert text not in run(tmp_path)
    assert text[:60] in run(tmp_path)


# --- a Trainer's checkpoint -------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_trainer_has_live_parameters(checkpoint: Path) -> None:
    one = told(checkpoint)
    held = load_file(checkpoint / LIVE)
    assert held.pop(f"{CONTAINER}.default.description").dtype is torch.uint8
    assert one["name"] == "default"
    assert one["options"]["projection"] is True
    assert one["live"] == {
        "file": LIVE,
        "bytes": (checkpoint / LIVE).stat().st_size,
        "parameters": sum(tensor.numel() for tensor in held.values()),
        "optimizer": "adamw_torch",
        "tensors": {name: list(tensor.shape) for name, tensor in held.items()},
    }
    require_tensors(one, load_file(checkpoint / TENSORS))
    text = run(checkpoint)
    assert f"{one['live']['parameters']:,} numbers in {len(held)} tensors" in text
    assert "trained as 'default' by adamw_torch" in text
    assert told(checkpoint.parent / "final")["live"] is None


def test_nothing_but_json_and_safetensors_is_read(checkpoint: Path, tmp_path: Path) -> None:
    expected = told(checkpoint)
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    others = [file for file in copy.iterdir() if file.suffix not in (".json", ".safetensors")]
    assert {file.name for file in others} >= {"optimizer.pt", "training_args.bin"}
    for file in others:
        file.write_bytes(pickle.dumps(files.Bomb()))
    assert told(copy) == {**expected, "path": str(copy)}


@pytest.mark.parametrize("content", [b"", b"soft prompt", pickle.dumps({})])
def test_live_parameters_that_are_damaged_are_an_error(checkpoint: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / LIVE).write_bytes(content)
    with pytest.raises(CheckpointError, match=LIVE):
        run(tmp_path / "copy")


@pytest.mark.parametrize(
    "description",
    [torch.zeros(3), torch.zeros((), dtype=torch.uint8), torch.zeros(3, dtype=torch.complex64)],
    ids=["floats", "one number", "complex"],
)
def test_live_parameters_of_others_have_no_name(saved: Path, tmp_path: Path, description: torch.Tensor) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    held = {CONTAINER: torch.zeros(2), "weight": torch.ones(2), f"{CONTAINER}.default.description": description}
    save_file(held, tmp_path / "copy" / LIVE)
    one = told(tmp_path / "copy")
    assert (one["name"], one["live"]["optimizer"], set(one["live"]["tensors"])) == (None, None, set(held))
    held[f"{CONTAINER}.default.description"] = torch.tensor(list(b"[1]"), dtype=torch.uint8)
    save_file(held, tmp_path / "copy" / LIVE)
    with pytest.raises(CheckpointError, match="JSON object"):
        run(tmp_path / "copy")


# --- PEFT's checkpoints -----------------------------------------------------------------------------------------------


def write_peft(folder: Path, arch: str, head: str, make: Callable[[Any], Any]) -> Any:
    """Have PEFT itself save an adapter."""
    peft = pytest.importorskip("peft")
    peft.get_peft_model(zoo.build(arch, head), make(peft)).save_pretrained(folder)
    return peft


PEFTS: dict[str, tuple[str, str, str, Callable[[Any], Any]]] = {
    "prompt": (
        "llama", "causal", "PromptTuning", lambda p: p.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    ),
    "p-tuning": (
        "llama", "sequence", "PTuning",
        lambda p: p.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=P, encoder_hidden_size=12),
    ),
    "prefix": (
        "bert", "tokens", "PrefixTuning", lambda p: p.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=P),
    ),
    "several tasks": (
        "llama", "causal", "MultitaskPromptTuning",
        lambda p: p.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=2),
    ),
    "llama-adapter": (
        "llama", "causal", "LlamaAdapter",
        lambda p: p.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=1),
    ),
    "encoder-decoder": (
        "t5", "seq2seq", "PromptTuning",
        lambda p: p.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFTS)
def test_checkpoints_of_peft_are_told(tmp_path: Path, kind: str) -> None:
    arch, head, name, make = PEFTS[kind]
    peft = write_peft(tmp_path, arch, head, make)
    config = json.loads((tmp_path / CONFIG).read_text())
    one = told(tmp_path)
    assert (one["format"], one["class"], one["num_virtual_tokens"], one["file"]) == ("peft", name, P, ADAPTER)
    assert one["base"]["task"] == config["task_type"]
    assert one["versions"] == ({"peft": config["peft_version"]} if "peft_version" in config else {})
    assert "peft_version" not in config or config["peft_version"].startswith(peft.__version__)
    assert (one["parameters"]["heads"] > 0) == (head in ("sequence", "tokens")) == bool(one["heads"])
    require_tensors(one, load_file(tmp_path / ADAPTER))
    text = run(tmp_path)
    assert f"{name}, {P} virtual tokens, written by PEFT" in text
    assert config["task_type"] in text
    assert ("direction not known" in text) == (head == "tokens")


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, "llama", "causal", lambda p: p.LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(CheckpointError, match="LORA"):
        run(tmp_path)


def test_a_pickle_of_peft_is_never_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": P}))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(files.Bomb()))
    with pytest.raises(CheckpointError, match="pickles are not loaded"):
        run(tmp_path)


def test_numbers_that_json_lacks_are_texts(tmp_path: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 1}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    rows = torch.tensor([[3.0, 4.0], [float("nan"), 1.0]])  # the second is the decoder's, which is not loaded
    save_file({"prompt_embeddings": rows}, tmp_path / ADAPTER)
    assert told(tmp_path)["tensors"][0]["row_norms"] == ["NaN", "NaN"]
    assert "nan to nan" in run(tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", files.CONTENTS)
def test_a_file_that_is_no_prompt_is_refused_as_load_refuses_it(saved: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / TENSORS).write_bytes(files.CONTENTS[name]((saved / TENSORS).read_bytes()))
    with pytest.raises(CheckpointError) as load:
        softhooks.load(zoo.build("bert", "sequence"), tmp_path)
    with pytest.raises(CheckpointError) as inspected:
        run(tmp_path)
    assert str(inspected.value) == str(load.value)


NEED_A_MODEL = {
    "a group that the model lacks", "a group too many", "another width", "another number of layers", "other heads",
    "another direction", "head of another shape", "head lacks a part", "head has a part more", "head that the model lacks",
    "head without a name", "the model's own weights as a head", "a path out", "an absolute path", "a parameter's path out",
}  # fmt: skip
"""Mismatches that show only with a model; the file itself is valid."""


@pytest.mark.parametrize("name", [*files.DESCRIPTIONS, *files.TENSOR_CHANGES])
def test_a_false_file_is_refused_as_load_refuses_it(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    if name in files.DESCRIPTIONS:
        folder = files.rewrite(tmp_path / "copy", files.DESCRIPTIONS[name])
    else:
        folder = files.rewrite(tmp_path / "copy", tensors=files.TENSOR_CHANGES[name])
    with pytest.raises((CheckpointError, PromptMismatchError)) as load:
        softhooks.load(zoo.build("bert", "sequence"), folder)
    if name in NEED_A_MODEL:
        require_tensors(told(folder), load_file(folder / TENSORS))
        return
    with pytest.raises(CheckpointError) as inspected:
        run(folder)
    assert str(inspected.value) == str(load.value)


def test_a_damaged_file_is_one_message_and_exit_code_1(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / TENSORS).write_bytes((8).to_bytes(8, "little") + b"not JSON")
    monkeypatch.setattr(sys, "argv", ["softhooks", "inspect", str(saved), str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        app.main()
    printed = capsys.readouterr()
    assert (leaving.value.code, printed.out) == (1, "")
    assert printed.err.startswith(
        f"CheckpointError: {tmp_path / TENSORS} is missing, truncated or not a safetensors file.\n"
    )
    assert str(tmp_path / TENSORS) in printed.err


def test_a_place_without_a_prompt_is_one_message_and_exit_code_2(saved: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, found in {
        tmp_path / "empty": "a directory without a prompt in it",
        tmp_path / "nowhere": "nothing",
        Path("user/repository"): "nothing",
        tmp_path / ("long" * 100): "File name too long",
        saved / TENSORS: "a file",
        saved / DESCRIPTION: "a file",
    }.items():
        status, message = failing(path)
        assert status == 2
        lines = message.splitlines()
        assert lines[0] == "there is no saved prompt at this path."
        assert lines[1] == f"path:     {path}"
        assert found in lines[3]
        assert len(lines) == 5
        assert failing(saved, path, "--json") == (2, message)  # and nothing is told of the other one
    status, message = failing(checkpoint.parent)
    assert status == 2
    assert all(str(checkpoint.parent / name) in message for name in ("checkpoint-2", "checkpoint-4", "final"))
    assert failing()[0] == 2


@pytest.mark.parametrize("option", ["--words", "--text"])
def test_options_of_a_model_without_a_model_are_refused(saved: Path, option: str) -> None:
    status, message = failing(saved, option, "3")
    assert status == 2
    assert f"{option} needs the base model" in message


# --- how it is shown --------------------------------------------------------------------------------------------------


def hostile(folder: Path, saved: Path) -> Path:
    shutil.copytree(saved, folder)
    change = files.put("base", "name_or_path", value=HOSTILE)

    def changed(description: dict[str, Any]) -> None:
        change(description)
        description["base"]["width"] = [HOSTILE]
        description["versions"] = {HOSTILE: HOSTILE, "torch": ["2"]}
        description["options"]["init"] = HOSTILE
        description["options"]["init_text"] = [[[HOSTILE]]]

    return files.rewrite(folder, changed)


def test_what_a_terminal_would_obey_is_spelled_out(saved: Path, tmp_path: Path) -> None:
    folder = hostile(tmp_path / "copy", saved)
    text = run(folder)
    assert not set(text) & set("\x1b\t\ud800\u202e")
    assert r"\x1b[2Ja\nmodel\t[bold]\ud800 \u202e" in text
    assert len(text.splitlines()) == len(run(saved).splitlines())
    one = told(folder)
    assert one["base"]["name_or_path"] == HOSTILE
    assert one["base"]["width"] is None
    assert one["versions"] == {HOSTILE: HOSTILE}
    assert one["options"]["init"] == HOSTILE
    assert "init_text" not in one["options"]


def test_errors_spell_it_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "\x1b[2J", "num_virtual_tokens": P}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file({"other": torch.zeros(2)}, tmp_path / ADAPTER)
    monkeypatch.setattr(sys, "argv", ["softhooks", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit):
        app.main()
    message = capsys.readouterr().err
    assert r"\x1b[2J" in message
    assert "\x1b" not in message
    assert len(message.splitlines()) == 6


def test_in_a_pipe_it_is_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    softhooks.attach(zoo.build("t5", "seq2seq"), PrefixTuning(P)).save_pretrained(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = CliRunner(env={"COLUMNS": "40"}).invoke(app.app, ["inspect", str(tmp_path)]).stdout.splitlines()
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)
    assert max(map(len, lines)) > 120  # nothing is wrapped
    assert len(lines) == len(run(tmp_path).splitlines())


def test_in_a_terminal_it_has_colors_and_fits(checkpoint: Path) -> None:
    screen = io.StringIO()
    show(
        [facts_of(checkpoint)],
        Console(file=screen, force_terminal=True, width=60, color_system="standard", no_color=False),
    )
    assert "\x1b[36m" in screen.getvalue()
    bare = io.StringIO()
    show([facts_of(checkpoint)], Console(file=bare, width=60))
    facts = bare.getvalue().split("virtual tokens, written by softhooks\n")[1]
    assert max(map(len, facts.splitlines())) <= 60
    assert "".join(LIVE.split()) in "".join(facts.split())


def test_several_are_told_in_order(saved: Path, checkpoint: Path) -> None:
    assert [one["path"] for one in json.loads(run(checkpoint, saved, "--json"))] == [str(checkpoint), str(saved)]
    assert run(checkpoint, saved) == run(checkpoint) + run(saved)


def test_help_teaches() -> None:
    text = " ".join(runner.invoke(app.app, ["inspect", "--help"]).output.split())
    for phrase in ("No model is needed", "norms of rows", "live", "--json", "Exit status", "softhooks inspect runs/"):
        assert phrase in text


# --- on its model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prompt with its initial values, as `softhooks train` leaves them, and its base model."""
    folder = tmp_path_factory.mktemp("trained")
    model_folder, model = on_disk.base(folder / "base", "llama")
    prompt = on_disk.saved(folder / "prompt", model, PromptTuning(P))
    on_disk.saved(prompt / "initial", model, PromptTuning(P), scale=0.5)
    return prompt, model_folder


def test_virtual_tokens_are_summed_up_without_a_model(saved: Path) -> None:
    lines = [" ".join(line.split()) for line in run(saved).splitlines()]
    [line] = [line for line in lines if line.startswith("slots norms")]
    one = told(saved)["slots"][0]
    assert f"{min(one['norms']):.4g} to {max(one['norms']):.4g}" in line
    assert not any("nearest words" in line or line.startswith("slot norm") for line in lines)


def test_with_its_model_each_virtual_token_has_words_and_each_layer_its_attention(trained: tuple[Path, Path]) -> None:
    prompt, base = trained
    one = json.loads(run(prompt, "--model", base, "--words", 2, "--text", "word5 word6", "--json"))[0]
    assert [len(words) for words in one["on_model"]["nearest_words"]] == [2] * P
    text = run(prompt, "--model", base, "--words", 2, "--text", "word5 word6")
    for row, words in enumerate(one["on_model"]["nearest_words"]):
        shown = ", ".join(f"{word['token']} {word['cosine']:.2f}" for word in words)
        assert any(line.split()[:1] == [str(row)] and shown in line for line in text.splitlines())
    for share in one["on_model"]["attention"]["self-attention"]:
        assert f"{share:.1%}" in text
    assert "enters as shared" in text


def test_drift_is_told_from_the_prompt_before_training(trained: tuple[Path, Path], checkpoint: Path) -> None:
    prompt, _ = trained
    one = told(prompt)
    assert one["drift_from"] == str(prompt / "initial")
    assert f"from {prompt / 'initial'}" in run(prompt)
    moved = json.loads(run(checkpoint.parent / "checkpoint-4", "--initial", checkpoint, "--json"))[0]
    rows = [load_file(folder / TENSORS)["prompt.text"] for folder in (checkpoint, checkpoint.parent / "checkpoint-4")]
    assert moved["slots"][0]["drift"]["distance"] == pytest.approx((rows[1] - rows[0]).norm(dim=1).tolist(), rel=1e-4)
    assert told(checkpoint)["drift_from"] is None
    assert failing(checkpoint, "--initial", checkpoint / "nowhere")[0] == 2


def test_another_base_model_is_refused_unless_told_otherwise(trained: tuple[Path, Path], tmp_path: Path) -> None:
    prompt, _ = trained
    model = zoo.build("llama", seed=3)
    model.save_pretrained(tmp_path)
    tokens.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PromptMismatchError):
        run(prompt, "--model", tmp_path)
    assert "nearest words" in run(prompt, "--model", tmp_path, "--no-strict")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        run(prompt, "--model", tmp_path, "--no-strict")


def test_a_page_is_written_next_to_what_is_printed(saved: Path, tmp_path: Path) -> None:
    assert run(saved, "--html", tmp_path / "page.html") == run(saved)
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_long_prompts_are_cut_for_people(tmp_path: Path) -> None:
    prompt = on_disk.saved(tmp_path / "prompt", zoo.build("llama"), PromptTuning(30))
    on_disk.saved(prompt / "initial", zoo.build("llama"), PromptTuning(30))
    assert "and 6 more virtual tokens" in run(prompt)
    assert len(told(prompt)["slots"][0]["norms"]) == 30


def test_gates_need_no_model(tmp_path: Path) -> None:
    prompt = on_disk.saved(tmp_path / "prompt", zoo.build("llama"), LlamaAdapter(P))
    [gates] = told(prompt)["gates"]
    text = run(prompt)
    assert "gates of text, mean size" in text
    for value in gates["mean"]:
        assert f"{value:.4g}" in text

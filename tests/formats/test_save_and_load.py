"""Saving and loading: bit for bit, complete or not at all, and no trust in a file's contents."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import table
import torch
import zoo
from damaged_files import CONTENTS, DESCRIPTIONS, TENSOR_CHANGES, _shape, rewrite, stir
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from untouched import remove_all, same_bits, untouched

import softhooks
from softhooks import (
    CheckpointError,
    NotAttachedError,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    SoftHooksError,
)
from softhooks.formats.softhooks_files import DESCRIPTION, FORMAT, TENSORS

CASES = [
    zoo.Case(*name.split("-"))
    for name in (
        "llama-causal", "gpt2-sequence", "opt-causal", "gemma3-sequence", "gptj-causal", "falcon-sequence", "bert-masked",
        "bert-tokens", "roberta-sequence", "bert-qa", "t5-seq2seq", "bart-seq2seq", "bart-sequence", "t5-tokens",
    )
]  # fmt: skip
PAIRS = [(entry, case) for entry in table.TABLE for case in CASES if entry.fits(case)]
STAYING = table.Entry("prefix-positions-stay", lambda p: PrefixTuning(p, shift_positions=False))
EVERYWHERE = table.Entry("prefix-seen-everywhere", lambda p: PrefixTuning(p, windowed=False))
CONVENTIONS = [
    (STAYING, zoo.Case("gpt2", "sequence")),
    (STAYING, zoo.Case("gptj", "causal")),
    (EVERYWHERE, zoo.Case("gemma3", "sequence")),
    (EVERYWHERE, zoo.Case("mistral", "causal")),
]
"""Prefixes with the other of two conventions, where it changes the output."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@torch.no_grad()
def answer(model: Any, case: zoo.Case, entry: table.Entry = table.TABLE[0]) -> torch.Tensor:
    """A model's outputs for a padded batch, in evaluation mode."""
    ids = zoo.text(3, 7, end=case.arch == "bart")
    mask = torch.ones_like(ids)
    if not (case.arch == "bart" and case.head == "sequence"):
        mask[1, 5:] = 0
        ids[1, 5:] = zoo.pad_id(model)
    return zoo.main_output(model.eval()(**zoo.inputs(case, ids, mask), **entry.extra(range(3)))).clone()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prompt for a BERT classifier, with its head."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(5)
    with softhooks.attach(zoo.build("bert", "sequence"), PrefixTuning(3)) as prompt:
        stir(prompt)
        prompt.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target() -> Any:
    """A model that fits a saved prompt; no test changes it."""
    return zoo.build("bert", "sequence")


# --- as it was --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "case"), [*PAIRS, *CONVENTIONS], ids=lambda item: str(item))
def test_folded_and_loaded_equal_live(tmp_path: Path, entry: table.Entry, case: zoo.Case) -> None:
    model = zoo.build(case.arch, case.head)
    prompt = entry.attach(model, 5)
    stir(prompt)
    expected = answer(model, case, entry)
    bare = answer(zoo.build(case.arch, case.head), case)
    assert not torch.allclose(expected, bare, atol=1e-4)

    prompt.save_pretrained(tmp_path)
    assert same_bits(answer(model, case, entry), expected), "saving must change nothing"
    model.train()
    prompt.fold()
    assert same_bits(answer(model, case, entry), expected), "folded must equal live"

    fresh = zoo.build(case.arch, case.head)
    loaded = softhooks.load(fresh, tmp_path)
    assert same_bits(answer(fresh, case, entry), expected), "loaded must equal saved"
    assert loaded.injection == prompt.injection
    assert loaded.conventions == prompt.conventions
    assert not list(loaded.parameters()), "a prompt that is loaded to be used does not train"
    held = sum(tensor.numel() for tensor in load_file(tmp_path / TENSORS).values())
    assert 0 < loaded.num_parameters <= held, "its parameters count, trainable or not"
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / TENSORS).keys() == load_file(tmp_path / TENSORS).keys()
    for name, tensor in load_file(tmp_path / TENSORS).items():
        assert same_bits(tensor, load_file(tmp_path / "again" / TENSORS)[name])
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize(("entry", "case"), CONVENTIONS, ids=lambda item: str(item))
def test_a_convention_changes_the_answer(entry: table.Entry, case: zoo.Case) -> None:
    """Otherwise the test above could not detect its loss."""
    answers = []
    for one in (entry, table.BY_NAME["prefix"]):
        torch.manual_seed(0)
        model = zoo.build(case.arch, case.head)
        with one.attach(model, 5) as prompt:
            stir(prompt)
            answers.append(answer(model, case))
    assert not torch.allclose(*answers, atol=1e-4)


def test_saving_in_the_middle_of_training_leaves_no_trace(tmp_path: Path) -> None:
    model = zoo.build("llama").train()
    prompt = softhooks.attach(model, PrefixTuning(4, projection=True, hidden_size=8, dropout=0.5))
    state = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    encoder = prompt.encoder
    prompt.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert prompt.encoder is encoder
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_prompt_of_a_bf16_model_is_saved_in_fp32(tmp_path: Path) -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    prompt = softhooks.attach(model, PromptTuning(4))
    stir(prompt)
    case = zoo.Case("llama", "causal")
    expected = answer(model, case)
    prompt.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS).values()} == {torch.float32}
    fresh = zoo.build("llama").to(torch.bfloat16)
    softhooks.load(fresh, tmp_path)
    assert same_bits(answer(fresh, case), expected)


def test_a_loaded_prompt_trains_on(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path)
    loaded = softhooks.load(model, tmp_path, trainable=True)
    names = [name for name, _ in loaded.named_parameters()]
    assert [name.split(".")[2] for name in names] == ["encoder", "heads", "heads"]
    model(zoo.text(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    loaded.verify_frozen()
    loaded.remove()
    rested = softhooks.load(model, tmp_path)
    with pytest.raises(NotAttachedError, match="trainable=True"):
        rested.verify_frozen()


def test_several_prompts_load_side_by_side(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    case = zoo.Case("bert", "sequence")
    expected = {}
    for name in ("en", "de"):
        with softhooks.attach(model, PromptTuning(4), name) as prompt:
            stir(prompt)
            expected[name] = answer(model, case)
            prompt.save_pretrained(tmp_path / name)
    with untouched(model):
        prompts = [softhooks.load(model, tmp_path / name, name=name) for name in expected]
        for name, logits in expected.items():
            softhooks.activate(model, name)
            assert same_bits(answer(model, case), logits)
        for prompt in prompts:
            prompt.remove()


def test_the_description_can_be_read_by_people(saved: Path) -> None:
    told = json.loads((saved / DESCRIPTION).read_text())
    with safe_open(saved / TENSORS, framework="pt") as file:
        whole = json.loads(file.metadata()[FORMAT])
    whole["base"]["fingerprint"] = whole["base"]["fingerprint"]["digest"]  # its numbers say nothing to people
    assert told == whole
    assert told["method"] == "prefix_tuning"
    assert told["options"]["num_virtual_tokens"] == 3
    assert told["heads"] == ["classifier"]
    assert told["base"]["class"] == "BertForSequenceClassification"
    assert told["tensors"]["head.classifier:weight"] == [3, 32]
    assert set(told["versions"]) == {"softhooks", "transformers", "torch"}


def test_what_was_trained_beside_the_prompt_is_said(tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    with softhooks.attach(model, PromptTuning(4), trainable="bert.pooler.*") as prompt:
        prompt.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 parameters of the base .*bert\.pooler\.dense\.weight"):
        softhooks.load(model, tmp_path)


def test_a_removed_prompt_cannot_be_saved(tmp_path: Path) -> None:
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(4))
    prompt.remove()
    with pytest.raises(NotAttachedError, match="removed"):
        prompt.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- whole or not at all ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Raised where the process would end."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_cut_short_leaves_the_old_or_the_new(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = zoo.Case("llama", "causal")
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(4))
    prompt.save_pretrained(tmp_path)
    old = answer(model, case)
    stir(prompt)
    new = answer(model, case)
    done: list[Any] = []
    replace = os.replace

    def cut(source: Any, goal: Any) -> None:
        if len(done) == renames:
            raise Killed
        done.append(goal)
        replace(source, goal)

    monkeypatch.setattr(os, "replace", cut)
    with contextlib.suppress(Killed):
        prompt.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert len(done) == renames
    assert {file.name for file in tmp_path.iterdir()} == {DESCRIPTION, TENSORS}, "no scraps"
    fresh = zoo.build("llama")
    softhooks.load(fresh, tmp_path)
    assert same_bits(answer(fresh, case), old if renames == 0 else new)


def test_a_full_disk_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(4))
    prompt.save_pretrained(tmp_path)
    before = (tmp_path / TENSORS).read_bytes()
    stir(prompt)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        prompt.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / TENSORS).read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {DESCRIPTION, TENSORS}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_killed_while_it_saves_leaves_a_whole_prompt(tmp_path: Path) -> None:
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(4))
    seen = set()
    for number in range(12):
        child = os.fork()
        if child == 0:  # only saves, until it is killed
            value = number * 1000.0
            while True:
                value += 1
                with torch.no_grad():
                    prompt.encoder.embeddings.fill_(value)
                prompt.save_pretrained(tmp_path)
        wait_for_another(tmp_path / TENSORS)
        time.sleep(0.003 * number)  # ... at some moment of the next
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with softhooks.load(zoo.build("llama"), tmp_path) as loaded:
            values = loaded.encoder.embeddings.unique()
        assert len(values) == 1
        seen.add(values.item())
    assert len(seen) == 12


def wait_for_another(file: Path) -> None:
    """Wait until a file has been replaced, however busy the machine is."""
    before = file.stat().st_ino if file.exists() else None
    deadline = time.monotonic() + 60
    while not file.exists() or file.stat().st_ino == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        softhooks.attach(zoo.build("llama"), PromptTuning(4)).save_pretrained(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "a" / "b").iterdir()} == {0o640}


# --- nothing is trusted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_false_description_is_refused(saved: Path, target: Any, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    folder = rewrite(tmp_path / "copy", DESCRIPTIONS[name])
    with untouched(target), pytest.raises((CheckpointError, PromptMismatchError), match=r"copy"):
        softhooks.load(target, folder)


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_false_tensors_are_refused(saved: Path, target: Any, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    folder = rewrite(tmp_path / "copy", tensors=TENSOR_CHANGES[name])
    with untouched(target), pytest.raises((CheckpointError, PromptMismatchError), match=r"copy"):
        softhooks.load(target, folder)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_prompt_is_refused(saved: Path, target: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / TENSORS).write_bytes(CONTENTS[name]((saved / TENSORS).read_bytes()))
    with untouched(target), pytest.raises(CheckpointError, match=TENSORS):
        softhooks.load(target, tmp_path)


def test_the_file_for_people_is_not_read(saved: Path, target: Any, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    for content in ("", "{}", '{"method": "lora"}'):
        (tmp_path / "copy" / DESCRIPTION).write_text(content)
        softhooks.load(target, tmp_path / "copy").remove()
    (tmp_path / "copy" / DESCRIPTION).unlink()
    softhooks.load(target, tmp_path / "copy").remove()


@pytest.mark.hypothesis
@hypothesis.given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.floats(0, 1),
    near_header=st.booleans(),
)
@hypothesis.settings(max_examples=max(60, hypothesis.settings.default.max_examples))
def test_damaged_bytes_give_an_error_or_a_prompt(
    saved: Path, target: Any, tmp_path_factory: pytest.TempPathFactory, edits: Any, cut: Any, near_header: bool
) -> None:
    whole = bytearray((saved / TENSORS).read_bytes())
    reach = 8 + int.from_bytes(whole[:8], "little") if near_header else len(whole)
    for place, byte in edits:
        whole[int(place * reach)] = byte
    folder = tmp_path_factory.mktemp("damaged")
    (folder / TENSORS).write_bytes(whole if cut is None else whole[: int(cut * len(whole))])
    with untouched(target):
        try:
            loaded = softhooks.load(target, folder)
        except SoftHooksError:
            return
        answer(target, zoo.Case("bert", "sequence"))
        assert all(bool(torch.isfinite(table).all()) for table in loaded.encoder.folded().values())
        loaded.remove()


# --- other models -----------------------------------------------------------------------------------------------------

BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: zoo.build("llama"),
    "wide llama": lambda: zoo.build("llama", hidden_size=64),
    "gpt2": lambda: zoo.build("gpt2"),
    "deep gpt2": lambda: zoo.build("gpt2", n_layer=4, n_head=2, n_embd=16),  # as many numbers as gpt2
    "bert": lambda: zoo.build("bert", "masked"),
    "classifier": lambda: zoo.build("bert", "sequence"),
    "classifier of five": lambda: zoo.build("bert", "sequence", num_labels=5),
    "t5": lambda: zoo.build("t5", "seq2seq"),
}
MISMATCHES = [
    ("llama", PromptTuning(4), "wide llama", r"\[4, 32\].*\[4, 64\]"),
    ("llama", PrefixTuning(4), "gpt2", r"\[2, 2, 8, 8\].*\[2, 4, 8, 8\]"),
    ("gpt2", PrefixTuning(4), "deep gpt2", r"\[2, 4, 8, 8\].*\[4, 2, 8, 8\]"),
    ("t5", PromptTuning(4), "llama", "encoder .*text"),
    ("t5", PrefixTuning(4), "llama", "encoder .*text"),
    ("llama", PromptTuning(4), "t5", "text .*encoder"),
    ("bert", PromptTuning(4), "llama", "causal=False.*causal=True"),
    ("classifier", PromptTuning(4), "classifier of five", r"\[3, 32\].*\[5, 32\]"),
    ("classifier", PromptTuning(4), "bert", "no such head"),
]


@pytest.mark.parametrize(("source", "method", "other", "words"), MISMATCHES)
def test_a_prompt_for_another_model_is_refused_naming_both(
    tmp_path: Path, source: str, method: Any, other: str, words: str
) -> None:
    with softhooks.attach(BUILD[source](), method) as prompt:
        prompt.save_pretrained(tmp_path)
    model = BUILD[other]()
    with untouched(model), pytest.raises(PromptMismatchError, match=f"(?s){words}"):
        softhooks.load(model, tmp_path)


def test_another_head_of_the_same_backbone_is_served(tmp_path: Path) -> None:
    base, model = zoo.build("llama", "causal"), zoo.build("llama", "sequence")
    model.model.load_state_dict(base.model.state_dict())
    with softhooks.attach(base, PromptTuning(4)) as prompt:
        prompt.save_pretrained(tmp_path)
    assert len(softhooks.load(model, tmp_path).heads) == 0


def test_a_refused_prompt_leaves_the_attached_one_alone(saved: Path, tmp_path: Path) -> None:
    model = zoo.build("bert", "sequence")
    case = zoo.Case("bert", "sequence")
    first = softhooks.attach(model, PromptTuning(4), "first")
    expected = answer(model, case)
    shutil.copytree(saved, tmp_path / "copy")
    rewrite(tmp_path / "copy", tensors=_shape("head.classifier:weight", 4, 32))
    with untouched(model), pytest.raises(PromptMismatchError):
        softhooks.load(model, tmp_path / "copy", name="second")
    assert same_bits(answer(model, case), expected)
    first.verify_frozen()


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "no/where", "../../etc/passwd", "/nowhere/at/all", "", "a\0b", "x" * 300])
def test_a_place_without_a_prompt_is_named(
    target: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with untouched(target), pytest.raises(CheckpointError):
        softhooks.load(target, path)


def test_a_file_in_the_place_of_a_directory_is_named(saved: Path, target: Any) -> None:
    with pytest.raises(CheckpointError, match="directory"):
        softhooks.load(target, saved / TENSORS)


@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("head", ["causal", "sequence"])
def test_parameters_count_whether_they_train_or_not(method: Any, head: str, tmp_path: Path) -> None:
    prompt = softhooks.attach(zoo.build("llama", head), method)
    trained = prompt.num_parameters
    assert trained == sum(parameter.numel() for parameter in prompt.parameters()) > 0
    prompt.save_pretrained(tmp_path)
    loaded = softhooks.load(zoo.build("llama", head), tmp_path)
    assert loaded.num_parameters == trained
    loaded.encoder.requires_grad_(True)
    assert loaded.num_parameters == trained

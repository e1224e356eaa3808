"""`summary`, `plot` and the texts of a prompt: what they say is what saving, calling and training do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import table
import torch
import zoo
from safetensors.torch import load_file
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, SoftHooksError, UnsupportedMethodError
from softhooks.runtime.slot_statistics import drift, similarities, slot_tables, table_norms

P = 4


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


@pytest.mark.parametrize("entry", table.TABLE, ids=str)
def test_the_numbers_are_those_of_the_file_and_of_the_model(tmp_path: Path, entry: table.Entry) -> None:
    arch, head = next((a, h) for a, h in [("llama", "causal"), ("bert", "sequence")] if entry.fits(zoo.Case(a, h)))
    model = zoo.build(arch, head)
    size = sum(parameter.numel() for parameter in model.parameters())
    prompt = entry.attach(model, P)
    told = prompt.summary()
    prompt.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "soft_prompt.safetensors")
    assert told.saved_bytes == sum(tensor.nbytes for tensor in saved.values())
    assert told.num_parameters == prompt.num_parameters
    assert told.model_parameters == size
    assert told.share == prompt.num_parameters / size
    assert (told.injection, told.num_virtual_tokens) == (prompt.injection, prompt.method.num_virtual_tokens)
    text = str(told)
    for phrase in (f"{told.num_parameters:,} parameters", f"{told.share:.4%}", told.way_in, type(model).__name__):
        assert phrase in text
    assert (f"in each call: {told.needs}" in text) == bool(told.needs)
    expected = []
    try:
        prompt.save_pretrained(tmp_path / "peft", as_peft=True)
    except UnsupportedMethodError as error:
        expected = [f"conversion to PEFT: {str(error).splitlines()[0]}"]
    assert [line for line in told.refused if "PEFT" in line] == expected


def test_a_loaded_prompt_does_not_train(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(P)) as prompt:
        assert not any("training" in line for line in prompt.summary().refused)
        prompt.save_pretrained(tmp_path)
    loaded = softhooks.load(zoo.build("llama"), tmp_path)
    assert "training, because the prompt was loaded without `trainable=True`" in loaded.summary().refused
    again = softhooks.load(zoo.build("llama"), tmp_path, trainable=True)
    assert not any("training" in line for line in again.summary().refused)


def test_which_servers_cannot_use_a_prompt() -> None:
    def refused(arch: str, head: str, method: softhooks.Method) -> str:
        with softhooks.attach(zoo.build(arch, head), method) as prompt:
            return "\n".join(prompt.summary().refused)

    assert "SGLang" not in refused("llama", "causal", PrefixTuning(P))
    assert "vLLM" not in refused("llama", "causal", PrefixTuning(P))
    assert "vLLM and SGLang" in refused("llama", "causal", LlamaAdapter(P))
    assert "vLLM" not in refused("llama", "causal", PromptTuning(P))
    assert "vLLM" not in refused("bert", "sequence", PrefixTuning(P))
    assert "continuous batching" in refused("llama", "causal", PromptTuning(P, placement="after_first"))
    assert "continuous batching" not in refused("llama", "causal", PromptTuning(P))


def test_what_slots_are_said_to_refuse_is_refused() -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(P), injection="slots")
    assert "packed rows" in prompt.summary().refused
    ids = torch.arange(4, 12)[None]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(softhooks.UnsupportedModeError):
        model(ids, position_ids=packed)
    assert "static caches, and caches that are returned to the caller" in prompt.summary().refused
    with pytest.raises(softhooks.UnsupportedModeError):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_what_a_prefix_is_said_to_refuse_is_refused() -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PrefixTuning(P))
    assert "`position_ids` that do not start at the model's own first position" in prompt.summary().refused
    ids = torch.arange(4, 12)[None]
    with pytest.raises(softhooks.UnsupportedModeError):
        model(ids, position_ids=torch.arange(3, 11)[None])


def test_the_texts_show_only_what_differs_from_the_defaults() -> None:
    assert str(PromptTuning(P)) == "PromptTuning(num_virtual_tokens=4)"
    assert str(PrefixTuning(P, init="random")) == "PrefixTuning(num_virtual_tokens=4, init='random')"
    assert str(LlamaAdapter(gate="raw")) == "LlamaAdapter(num_virtual_tokens=10, gate='raw')"
    long = PrefixTuning(P, init_ids=tuple(range(50)))
    assert len(str(long)) < 80
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(P))
    assert repr(prompt) == (
        "SoftPrompt('default', PromptTuning(num_virtual_tokens=4), 128 parameters, shared on LlamaForCausalLM)"
    )
    prompt.remove()
    assert repr(prompt).endswith("removed on LlamaForCausalLM)")
    with pytest.raises(softhooks.NotAttachedError):
        prompt.summary()


@pytest.mark.parametrize(("arch", "head", "plots"), [("llama", "causal", 1), ("t5", "seq2seq", 3)])
def test_a_plot_shows_norms_and_similarities(tmp_path: Path, arch: str, head: str, plots: int) -> None:
    prompt = softhooks.attach(zoo.build(arch, head), PrefixTuning(P))
    figure = prompt.plot()
    groups = [axes for axes in figure.axes if axes.get_ylabel() == "norm"]
    assert [axes.get_title() for axes in groups] == list(prompt.encoder.groups)
    assert len(groups) == plots
    first = prompt.encoder.folded()[prompt.encoder.groups[0]]
    assert [bar.get_height() for bar in groups[0].patches] == pytest.approx(first.norm(dim=1).tolist())
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = softhooks.attach(zoo.build("llama"), PromptTuning(P))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SoftHooksError, match=r"softhooks\[plot\]"):
        prompt.plot()


def test_statistics_of_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert table_norms(rows).tolist() == [5.0, 2.0]
    assert similarities(rows)[0].tolist() == pytest.approx([1.0, 0.8])
    assert similarities(rows, rows[1:]).flatten().tolist() == pytest.approx([0.8, 1.0])
    moved, cosine = drift(rows, torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    assert moved.tolist() == [4.0, 0.0]
    assert cosine.tolist() == pytest.approx([0.6, 1.0])
    assert list(slot_tables({"a": rows, "b": rows[:1], "c": torch.zeros(2)}, 2)) == ["a"]

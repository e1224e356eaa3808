"""SPoT: starting a prompt from another, and finding the most similar of several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peers
import pytest
import tokens
import torch
import toy
import zoo
from torch.nn import functional

import softhooks
from softhooks import (
    CheckpointError,
    OptionError,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    ResidualPromptTuning,
    UnsupportedModeError,
    most_similar,
    nearest_words,
    similarity,
)
from softhooks.method import Method

P = 4
SOURCES: dict[str, Method] = {
    "prompt": PromptTuning(P),
    "in slots": PromptTuning(P, placement="after_first"),
    "residual": ResidualPromptTuning(P, hidden_size=8),
}


@torch.no_grad()
def tuned(folder: Path, method: Method, name: str = "source") -> torch.Tensor:
    """Save a prompt with random values, and return its rows."""
    model = zoo.build("llama")
    with softhooks.attach(model, method) as prompt:
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        prompt.save_pretrained(folder / name)
        return prompt.encoder("embeddings").clone()


@pytest.mark.parametrize("source", SOURCES)
def test_a_prompt_starts_from_a_saved_one(tmp_path: Path, source: str) -> None:
    rows = tuned(tmp_path, SOURCES[source])
    for given in (tmp_path / "source", str(tmp_path / "source")):
        for method in (
            PromptTuning(P, init="prompt", init_from=given),
            ResidualPromptTuning(P, init="prompt", init_from=given),
        ):
            with softhooks.attach(zoo.build("llama"), method) as prompt:
                assert torch.equal(prompt.encoder("embeddings"), rows)


def test_a_prompt_starts_from_an_attached_one_and_leaves_it_alone() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(P), "source") as source:
        rows = source.encoder("embeddings").detach().clone()
        target = softhooks.attach(model, PromptTuning(P, init="prompt", init_from=source), "target")
        assert torch.equal(target.encoder("embeddings"), rows)
        with torch.no_grad():
            target.encoder.embeddings.add_(1.0)
        assert torch.equal(source.encoder("embeddings"), rows)


@pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
def test_a_prompt_starts_from_one_that_peft_wrote(tmp_path: Path) -> None:
    rows = torch.randn(P, 32)
    peers.prompted(zoo.build("llama"), rows).save_pretrained(tmp_path)
    with softhooks.attach(zoo.build("llama"), PromptTuning(P, init="prompt", init_from=tmp_path)) as prompt:
        assert torch.equal(prompt.encoder("embeddings"), rows)


def test_how_it_started_is_not_needed_to_load_it(tmp_path: Path) -> None:
    tuned(tmp_path, PromptTuning(P))
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(P, init="prompt", init_from=str(tmp_path / "source"))) as prompt:
        prompt.save_pretrained(tmp_path / "target")
    (tmp_path / "source" / "soft_prompt.safetensors").unlink()
    with softhooks.load(model, tmp_path / "target") as again:
        assert again.method == PromptTuning(P)


@pytest.mark.parametrize(("length", "arch", "width"), [(P + 1, "llama", 32), (P, "opt", 16)])
def test_another_length_or_width_is_refused(tmp_path: Path, length: int, arch: str, width: int) -> None:
    tuned(tmp_path, PromptTuning(P))
    method = PromptTuning(length, init="prompt", init_from=tmp_path / "source")
    message = rf"(?s)init from: +\[{P}, 32\].*expected: +\[{length}, {width}\]"
    model = zoo.build(arch)
    with pytest.raises(PromptMismatchError, match=message):
        softhooks.attach(model, method)
    assert not hasattr(model, "soft_prompt")


def test_a_prefix_is_no_start_for_rows(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), PrefixTuning(P)) as prompt:
        prompt.save_pretrained(tmp_path)
    with pytest.raises(
        OptionError,
        match=r"\(prefix_tuning\) has other tensors \(text\) instead of embeddings, so it cannot be used to initialize another",
    ):
        softhooks.attach(zoo.build("llama"), PromptTuning(P, init="prompt", init_from=tmp_path))


def test_options_that_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="init_from is missing"):
        PromptTuning(P, init="prompt")
    with pytest.raises(OptionError, match="init_from is given"):
        PromptTuning(P, init_from=tmp_path)
    with pytest.raises(
        OptionError, match="the prompt is of type int; it must be a SoftPrompt, a directory, a repository or a tensor"
    ):
        softhooks.attach(zoo.build("llama"), PromptTuning(P, init="prompt", init_from=3))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        softhooks.attach(zoo.build("llama"), PromptTuning(P, init="prompt", init_from=tmp_path))


# --- the nearest ------------------------------------------------------------------------------------------------------


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """By hand, of the means of two prompts' tokens."""
    a, b = ([sum(column) / len(column) for column in zip(*rows.tolist(), strict=True)] for rows in (one, other))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_the_nearest_comes_first(tmp_path: Path) -> None:
    goal = torch.randn(P, 32)
    far, near = -goal + 0.1 * torch.randn(P, 32), goal[:2] + 0.1 * torch.randn(2, 32)
    saved = tuned(tmp_path, PromptTuning(6), "saved")
    ranked = most_similar({"far": far, "saved": tmp_path / "saved", "near": near}, goal)
    assert [name for name, _ in ranked][0::2] == ["near", "far"]
    for (name, found), rows in zip(ranked, (near, saved, far), strict=True):
        assert found == pytest.approx(cosine(rows, goal), abs=1e-5), name
    assert most_similar([str(tmp_path / "saved")], saved) == [(str(tmp_path / "saved"), pytest.approx(1.0))]


@pytest.mark.parametrize("wrong", [{}, [], "a directory"], ids=str)
def test_nothing_to_compare(wrong: Any) -> None:
    with pytest.raises(OptionError, match="pass one or more"):
        most_similar(wrong, torch.zeros(2, 3))


def test_prompts_of_other_models_are_not_compared() -> None:
    with pytest.raises(PromptMismatchError, match=r"(?s)width \[3\].*'b': \[4\]"):
        most_similar({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}, torch.ones(5, 3))


def test_a_start_from_the_same_task_learns_at_once_and_is_the_nearest(tmp_path: Path) -> None:
    """Prompts for three functions are stored; a short tuning on a few words identifies the one similar to the target."""
    model, stored = toy.model(), {}
    for function in range(3):
        torch.manual_seed(function)
        with softhooks.attach(model, PromptTuning(P, init="random")) as prompt:
            toy.tune(model, prompt, function, lr=2e-2, steps=60)
            stored[str(function)] = prompt.encoder("embeddings").detach().clone()
    torch.manual_seed(9)
    words, losses = range(4), {}
    for start in ("1", "2"):
        with softhooks.attach(model, PromptTuning(P, init="tensor", init_tensor=stored[start])) as prompt:
            losses[start] = toy.tune(model, prompt, 1, words, lr=1e-3, steps=5)
    assert losses["1"][0] < 0.1 < losses["2"][0]
    with softhooks.attach(
        model, PromptTuning(P, init="tensor", init_tensor=torch.stack(list(stored.values())).mean(0))
    ) as prompt:
        toy.tune(model, prompt, 1, words, lr=2e-2, steps=10)
        ranked = most_similar(stored, prompt)
    assert ranked[0][0] == "1", ranked


# --- words ------------------------------------------------------------------------------------------------------------

TOKENIZER = tokens.tokenizer()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "bert"])
@pytest.mark.parametrize("at_once", [7, 8192])
def test_they_are_those_of_a_search_by_hand(arch: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", at_once)
    model = zoo.build(arch, "sequence" if arch == "bert" else "causal")
    embedding = model.get_input_embeddings()
    table = embedding(torch.arange(embedding.num_embeddings)).detach().double()
    rows = torch.randn(5, table.shape[1])
    with softhooks.attach(model, PromptTuning(5, init="tensor", init_tensor=rows)) as prompt:
        found = nearest_words(prompt, TOKENIZER, 3)
    for row, near in zip(rows.double(), found, strict=True):
        cosines = functional.cosine_similarity(row, table[: len(TOKENIZER)], dim=1)
        assert [word.id for word in near] == cosines.argsort(descending=True)[:3].tolist()
        assert [word.cosine for word in near] == pytest.approx(
            cosines.sort(descending=True).values[:3].tolist(), abs=1e-5
        )
        assert [word.token for word in near] == TOKENIZER.convert_ids_to_tokens([word.id for word in near])


def test_a_prompt_of_words_lies_at_its_words() -> None:
    model = zoo.build("gemma3")
    text = tokens.words([12, 40, 7, 12])
    with softhooks.attach(model, PromptTuning(4, init="text", init_text=text, tokenizer=TOKENIZER)) as prompt:
        found = nearest_words(prompt, TOKENIZER, 1)
    assert [row[0].token for row in found] == text.split()
    assert all(row[0].cosine == pytest.approx(1.0, abs=1e-5) for row in found)


def test_of_equal_words_the_first_is_named_and_ids_without_a_word_are_left_out() -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50:] = model.get_input_embeddings().weight[20]
    few = tokens.tokenizer(60)
    rows = model.get_input_embeddings().weight[20:21].detach().clone()
    with softhooks.attach(model, PromptTuning(1, init="tensor", init_tensor=rows)) as prompt:
        assert [word.id for word in nearest_words(prompt, few, 4)[0]] == [20, 50, 51, 52]
        with pytest.raises(OptionError, match=r"`count` is 61; .* from 1 to 60"):
            nearest_words(prompt, few, 61)
        for count in (0, True, 1.5):
            with pytest.raises(OptionError, match=f"`count` is {count}; it must be an integer from 1"):
                nearest_words(prompt, few, count)  # type: ignore[arg-type]


def test_keys_and_values_and_parts_have_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    with (
        softhooks.attach(model, PrefixTuning(2)) as prompt,
        pytest.raises(OptionError, match=r"prefix_tuning.* of embeddings, so it cannot be compared with words"),
    ):
        nearest_words(prompt, TOKENIZER)
    monkeypatch.setattr(similarity, "is_sharded_model", lambda model: True)
    with softhooks.attach(model, PromptTuning(2)) as prompt, pytest.raises(UnsupportedModeError, match="sharded"):
        nearest_words(prompt, TOKENIZER)

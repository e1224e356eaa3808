"""`nearest_words` equals a search by hand over the vocabulary as the model embeds it."""

from __future__ import annotations

import pytest
import tokens
import torch
import zoo
from torch.nn import functional

import softhooks
from softhooks import OptionError, PrefixTuning, PromptTuning, UnsupportedModeError, nearest_words, similarity

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
            with pytest.raises(OptionError, match=f"`count` is {count}; it must be a whole number"):
                nearest_words(prompt, few, count)  # type: ignore[arg-type]


def test_keys_and_values_and_parts_have_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    with (
        softhooks.attach(model, PrefixTuning(2)) as prompt,
        pytest.raises(OptionError, match=r"prefix_tuning.* not embedding rows, so it cannot be compared with words"),
    ):
        nearest_words(prompt, TOKENIZER)
    monkeypatch.setattr(similarity, "is_sharded_model", lambda model: True)
    with softhooks.attach(model, PromptTuning(2)) as prompt, pytest.raises(UnsupportedModeError, match="sharded"):
        nearest_words(prompt, TOKENIZER)

"""Initialization of prompts: the exact rows of every initializer, and the outputs of a prompt made of words."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import tokens
import torch
import zoo
from torch import Tensor

import softhooks
from softhooks import PromptTuning
from softhooks.backbone.examine import examine
from softhooks.backbone.stack import ModelStructure

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
TOKENIZER = tokens.tokenizer()


def rows(model: Any, method: Any) -> Tensor:
    """The rows that a method starts from."""
    with softhooks.attach(model, method) as prompt:
        assert [name for name, _ in prompt.encoder.named_parameters()] == ["embeddings"]
        parameter = next(prompt.encoder.parameters())
        assert parameter.dtype == torch.float32
        return parameter.detach().clone()


def table(model: Any) -> Tensor:
    """The model's embedding of every id, its scale included."""
    return model.get_input_embeddings()(torch.arange(model.config.vocab_size)).detach().float()


def ids_of(found: Tensor, model: Any) -> list[int]:
    """The words that rows are."""
    words = table(model)
    ids = (found[:, None, 0] == words[None, :, 0]).int().argmax(-1)
    assert torch.equal(words[ids], found), "a row is no word"
    return ids.tolist()


@pytest.fixture(scope="module")
def large() -> tuple[Any, ModelStructure]:
    """A model of 6,000 words, so that the first 5,000 are not all."""
    model = zoo.build("gpt2", vocab_size=6000)
    return model, examine(model)


def drawn(large: tuple[Any, ModelStructure], method: PromptTuning) -> list[int]:
    model, structure = large
    return ids_of(method.build(structure)("embeddings").detach(), model)


def test_random_rows_fill_the_range() -> None:
    found = rows(zoo.build("llama"), PromptTuning(90, init="random"))
    assert found.shape == (90, 32)
    assert -0.5 <= found.min() < -0.49
    assert 0.49 < found.max() < 0.5
    assert abs(float(found.mean())) < 0.02
    assert abs(float(found.var()) - 1 / 12) < 0.005


def test_vocabulary_rows_are_words_without_replacement() -> None:
    model = zoo.build("llama")
    ids = ids_of(rows(model, PromptTuning(90)), model)
    assert len(set(ids)) == 90
    torch.manual_seed(1)
    assert ids_of(rows(model, PromptTuning(90)), model) != ids


def test_vocabulary_rows_are_among_the_first_5000(large: tuple[Any, ModelStructure]) -> None:
    ids = drawn(large, PromptTuning(4000))
    assert len(set(ids)) == 4000
    assert 4900 < max(ids) < 5000
    assert sorted(drawn(large, PromptTuning(5000))) == list(range(5000))


def test_the_whole_vocabulary(large: tuple[Any, ModelStructure]) -> None:
    ids = drawn(large, PromptTuning(4000, whole_vocabulary=True))
    assert len(set(ids)) == 4000
    assert max(ids) > 5900


def test_more_rows_than_5000_draw_from_the_whole_vocabulary(large: tuple[Any, ModelStructure]) -> None:
    ids = drawn(large, PromptTuning(5500))
    assert len(set(ids)) == 5500
    assert max(ids) > 5900


def test_more_rows_than_words_repeat_words() -> None:
    model = zoo.build("llama", vocab_size=20)
    ids = ids_of(rows(model, PromptTuning(60)), model)
    assert len(ids) == 60
    assert set(ids) <= set(range(20))


def test_text_is_cut_and_has_no_special_tokens() -> None:
    model = zoo.build("llama")
    text = tokens.words([9, 8, 7, 6, 5])
    method = PromptTuning(3, init="text", init_text=text, tokenizer=TOKENIZER)
    assert ids_of(rows(model, method), model) == [9, 8, 7]


def test_text_is_filled_with_other_words() -> None:
    model = zoo.build("llama")
    method = PromptTuning(40, init="text", init_text=tokens.words([9, 8, 7]), tokenizer=TOKENIZER)
    ids = ids_of(rows(model, method), model)
    assert ids[:3] == [9, 8, 7]
    assert len(set(ids[3:])) == 37


def test_a_tokenizer_by_its_name(tmp_path: Any) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    model = zoo.build("llama")
    method = PromptTuning(2, init="text", init_text=tokens.words([9, 8]), tokenizer=str(tmp_path))
    assert ids_of(rows(model, method), model) == [9, 8]


def test_labels_are_the_means_of_their_words() -> None:
    model = zoo.build("llama")
    labels = [tokens.words([9]), tokens.words([4, 5, 6]), tokens.words([7, 8])]
    found = rows(model, PromptTuning(5, init="class_labels", init_labels=labels, tokenizer=TOKENIZER))
    words = table(model)
    for row, ids in zip(found, ([9], [4, 5, 6], [7, 8]), strict=False):
        torch.testing.assert_close(row, words[ids].mean(0))
    assert len(set(ids_of(found[3:], model))) == 2
    cut = rows(model, PromptTuning(2, init="class_labels", init_labels=labels, tokenizer=TOKENIZER))
    assert torch.equal(cut, found[:2])


def test_a_tensor_is_copied() -> None:
    model, given = zoo.build("llama"), torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    before = given.detach().clone()
    with softhooks.attach(model, PromptTuning(3, init="tensor", init_tensor=given)) as prompt:
        assert torch.equal(prompt.encoder.embeddings, before.float())
        with torch.no_grad():
            prompt.encoder.embeddings.add_(1)
    assert torch.equal(given, before)


def test_rows_of_a_scaled_embedding_enter_after_the_scale() -> None:
    model = zoo.build("gemma3")
    scale = float(model.model.embed_tokens.embed_scale)
    assert scale == pytest.approx(32**0.5)
    method = PromptTuning(2, init="text", init_text=tokens.words([9, 8]), tokenizer=TOKENIZER)
    torch.testing.assert_close(rows(model, method), model.model.embed_tokens.weight[[9, 8]].detach() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_rows_of_a_scaled_embedding_s_weight_are_their_words(dtype: torch.dtype) -> None:
    model = zoo.build("gemma3").to(dtype)
    embedding, words = model.get_input_embeddings(), torch.tensor([9, 8, 9])
    weight, outputs = embedding.weight[words].detach(), embedding(words).detach().float()
    own, near = torch.randn(32), weight[0].float() * (1 + 2**-7)
    given = torch.stack([own, weight[0].float(), outputs[1], near, weight[2].float()])
    expected = torch.stack([own, outputs[0], outputs[1], near, outputs[2]])
    assert torch.equal(rows(model, PromptTuning(5, init="tensor", init_tensor=given)), expected)


def test_given_rows_of_a_plain_embedding_s_weight_stay_as_they_are() -> None:
    model = zoo.build("llama")
    given = model.get_input_embeddings().weight[[9, 8]].detach()
    assert torch.equal(rows(model, PromptTuning(2, init="tensor", init_tensor=given)), given)


def test_rows_of_a_half_precision_model_are_exact() -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    method = PromptTuning(2, init="text", init_text=tokens.words([9, 8]), tokenizer=TOKENIZER)
    assert torch.equal(rows(model, method), model.get_input_embeddings().weight[[9, 8]].detach().float())


@pytest.mark.parametrize("init", ["vocab", "random", "text"])
def test_a_seed_decides(init: str) -> None:
    model = zoo.build("llama")
    words = {"init_text": "word9", "tokenizer": TOKENIZER} if init == "text" else {}
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(rows(model, PromptTuning(5, init=init, **words)))
    assert torch.equal(*found)


# --- a prompt of words computes what the words compute ----------------------------------------------------------------

SPOKEN = [21, 35, 11, 52, 44, 60, 13, 77, 31, 5]  # longer than every sliding window here


@pytest.mark.parametrize("injection", [None, "slots"])
@pytest.mark.parametrize("arch", [*zoo.CAUSAL, *zoo.CACHED])
def test_a_text_prompt_is_the_hard_prompt(arch: str, injection: Any) -> None:
    model, bare = zoo.build(arch), zoo.build(arch)
    method = PromptTuning(len(SPOKEN), init="text", init_text=tokens.words(SPOKEN), tokenizer=TOKENIZER)
    ids = zoo.text(2, 7)
    spoken = torch.cat([torch.tensor(SPOKEN).expand(2, -1), ids], dim=1)
    expected = bare(spoken).logits[:, len(SPOKEN) :]
    texts = [ids[0], ids[1, :4]]
    with softhooks.attach(model, method, injection=injection):
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        found = model.generate(**naive.left_padded(texts), max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, text in zip(found, texts, strict=True):
        right = naive.greedy(naive.bare_step(bare), torch.cat([torch.tensor(SPOKEN), text]), 4)
        assert torch.equal(row[-len(text) - 4 :], right[len(SPOKEN) :])


@pytest.mark.parametrize("head", ["masked", "seq2seq"])
def test_a_text_prompt_is_the_hard_prompt_in_an_encoder(head: str) -> None:
    for arch in zoo.ENCODERS if head == "masked" else zoo.SEQ2SEQ:
        model, ids = zoo.build(arch, head), zoo.text(2, 7)
        more = {"decoder_input_ids": zoo.text(2, 3, seed=8)} if head == "seq2seq" else {}
        spoken = torch.cat([ids[:, :1], torch.tensor(SPOKEN).expand(2, -1), ids[:, 1:]], dim=1)
        expected = model(spoken, **more).logits
        if head == "masked":
            expected = torch.cat([expected[:, :1], expected[:, 1 + len(SPOKEN) :]], dim=1)
        method = PromptTuning(
            len(SPOKEN), init="text", init_text=tokens.words(SPOKEN), tokenizer=TOKENIZER, placement="after_first"
        )
        with softhooks.attach(model, method):
            torch.testing.assert_close(model(ids, **more).logits, expected, **CLOSE)

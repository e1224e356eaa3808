"""Classes as words: labels, scores and the loss at the mask, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tokens
import torch
from torch.nn import functional

from softhooks import Layout, OptionError, Verbalizer

WORDS = ["no", "yes", "maybe"]


def made(**options: Any) -> tuple[Any, Verbalizer]:
    tokenizer = tokens.masked()
    return tokenizer, Verbalizer(WORDS, tokenizer, **options)


def test_the_loss_is_cross_entropy_over_the_words_at_the_mask() -> None:
    tokenizer, words = made()
    batch = tokenizer(["hello [MASK] .", "the red cat was [MASK]"], return_tensors="pt", padding=True)
    classes = torch.tensor([2, 0])
    labels = words.labels(batch["input_ids"], classes)
    logits = torch.randn(*batch["input_ids"].shape, len(tokenizer), requires_grad=True)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in WORDS]
    by_hand = torch.stack([logits[0, 2, ids], logits[1, 5, ids]])
    expected = functional.cross_entropy(by_hand, classes)
    assert words.ids == ids
    assert labels.tolist()[0] == [-100, -100, ids[2], -100, -100, -100, -100]
    assert torch.equal(words.scores(logits, batch["input_ids"]), by_hand)
    loss = words({"logits": logits}, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(words((logits,), labels), expected)
    torch.testing.assert_close(words({"logits": logits}, labels, num_items_in_batch=torch.tensor(8)), expected / 4)
    (gradient,) = torch.autograd.grad(loss, logits)
    touched = gradient.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 2], [1, 5]]
    assert gradient[0, 2].nonzero()[:, 0].tolist() == sorted(ids)


def test_in_a_language_model_the_token_before_predicts_the_word() -> None:
    tokenizer, words = made(causal=True)
    batch = tokenizer(["hello yes", "red no"], return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 2] = batch["input_ids"][:, 2]
    logits = torch.randn(2, 4, len(tokenizer))
    expected = functional.cross_entropy(logits[:, 1][:, words.ids], torch.tensor([1, 0]))
    torch.testing.assert_close(words({"logits": logits}, labels), expected)


def test_a_mapper_puts_the_word_where_the_mask_stands() -> None:
    tokenizer, words = made()
    layout = Layout("{a} {soft:2} {mask} .")
    row = layout.mapper(tokenizer, verbalizer=words, label="kind")({"a": "hello [MASK] world", "kind": 1})
    place = len(row["labels"]) - 3
    assert row["input_ids"][place] == tokenizer.mask_token_id
    assert row["labels"] == [-100] * place + [words.ids[1], -100, -100]
    for fields in ({"a": "b"}, {"a": "b", "kind": 3}, {"a": "b", "kind": "yes"}):
        with pytest.raises(OptionError):
            layout.mapper(tokenizer, verbalizer=words, label="kind")(fields)
    for template in ("{a} {soft:2}", "{mask} {a} {soft:2} {mask}"):
        with pytest.raises(OptionError, match=r"one \{mask\}"):
            Layout(template).mapper(tokenizer, verbalizer=words)
    with pytest.raises(OptionError, match="target and verbalizer are both given; pass only one of them"):
        layout.mapper(tokenizer, verbalizer=words, target="a")


def test_rows_with_no_mask_or_two() -> None:
    tokenizer, words = made()
    ids = tokenizer(["a [MASK] b", "a c b", "[MASK] [MASK] b"], return_tensors="pt")["input_ids"]
    with pytest.raises(OptionError, match=r"exactly one mask(.|\n)*rows: *1, 2\nfound: *\[0, 2\]"):
        words.labels(ids, torch.zeros(3).long())


def test_a_label_that_is_no_word() -> None:
    _, words = made()
    labels = torch.tensor([[-100, 3, words.ids[0]]])
    with pytest.raises(
        OptionError, match=r"the labels contain \[3\]; each label must be the id of a class's word, or -100"
    ):
        words({"logits": torch.randn(1, 3, 40)}, labels)


@pytest.mark.parametrize(
    "words", ["yes", ["yes"], ["yes", "yes"], ["yes", "zebra"], ["yes", "it was"], [True, 3], [1.5, 2]], ids=str
)
def test_words_that_are_no_classes(words: Any) -> None:
    with pytest.raises(OptionError):
        Verbalizer(words, tokens.masked())


def test_ids_need_no_tokenizer() -> None:
    assert Verbalizer([7, 9]).ids == [7, 9]
    with pytest.raises(OptionError, match="if a tokenizer is given"):
        Verbalizer(["a", "b"])
    with pytest.raises(OptionError, match="mask token"):
        Verbalizer([7, 9]).scores(torch.randn(1, 2, 10), torch.tensor([[1, 2]]))

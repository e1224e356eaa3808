"""Classes as words: labels, scores and the loss at the mask, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import tokens
import torch
import zoo
from torch.nn import functional

import softhooks
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


# --- causal language models -------------------------------------------------------------------------------------------


def language_model_words() -> tuple[Any, Verbalizer, Layout]:
    tokenizer = tokens.merged()  # has no mask token
    return tokenizer, Verbalizer(["bad", "great"], tokenizer, causal=True), Layout("{a} answer:{soft:2} {mask}")


def test_in_a_language_model_the_word_replaces_the_mask() -> None:
    tokenizer, words, layout = language_model_words()
    mapper = layout.mapper(tokenizer, verbalizer=words)
    row, unlabeled = mapper({"a": "the cat", "label": 1}), mapper({"a": "the cat"})
    length = len(unlabeled["input_ids"])
    assert row["input_ids"] == [*unlabeled["input_ids"], words.ids[1]]
    assert row["labels"] == [-100] * length + [words.ids[1]]
    assert row["soft_slots"] == unlabeled["soft_slots"] == [length] * 2
    assert "labels" not in unlabeled
    by_target = Layout("{a} answer:{soft:2} {word}").mapper(tokenizer, target="word")
    assert by_target({"a": "the cat", "word": "great"}) == row


def test_a_row_without_a_class_is_truncated_as_with_one() -> None:
    tokenizer, words, layout = language_model_words()
    chat = Layout([{"role": "user", "content": "{a} answer:{soft:2} {mask} ."}])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} end {% endfor %}"
    for form in (layout, chat):
        mapper = form.mapper(tokenizer, verbalizer=words, max_length=28)
        row, unlabeled = mapper({"a": "the cat was great " * 9, "label": 0}), mapper({"a": "the cat was great " * 9})
        place = row["labels"].index(words.ids[0])
        assert len(row["input_ids"]) + 2 == 28
        assert unlabeled["input_ids"] == row["input_ids"][:place]
        assert unlabeled["attention_mask"] == [1] * place


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_language_model_scores_rows_without_a_class_as_rows_with_one(side: str) -> None:
    tokenizer, words, layout = language_model_words()
    tokenizer.padding_side = side
    collate = layout.collator(tokenizer, verbalizer=words)
    model = zoo.build("llama", vocab_size=len(tokenizer))
    rows = [{"a": "the cat", "label": 1}, {"a": "a red dog was great", "label": 0}]
    with softhooks.attach(model, softhooks.PTuning(layout=layout)), torch.no_grad():
        labeled = collate(rows)
        labels = labeled.pop("labels")
        expected = words.scores_at_labels(model(**labeled).logits, labels)
        batch = collate([{"a": row["a"]} for row in rows])
        scores = words.scores(model(**batch).logits, batch["input_ids"], batch["attention_mask"])
    assert "labels" not in batch
    torch.testing.assert_close(scores, expected)


def test_messages_for_language_models() -> None:
    tokenizer, words, layout = language_model_words()
    with pytest.raises(OptionError, match=r"no mask token(.|\n)*causal=True"):
        layout.mapper(tokenizer)({"a": "the cat"})
    with pytest.raises(OptionError, match=r"after \{mask\}(.|\n)*Write \{mask\} after all"):
        Layout("{a} {mask} {soft:2}").mapper(tokenizer, verbalizer=words)
    with pytest.raises(OptionError, match="attention_mask"):
        words.scores(torch.randn(1, 2, len(tokenizer)), torch.tensor([[1, 2]]))
    with pytest.raises(OptionError, match="has no `labels`"):
        words({"logits": torch.randn(1, 2, len(tokenizer))}, None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="index of its word"):
        layout.mapper(tokenizer, verbalizer=words)({"a": "the cat", "label": "yes"})
    with pytest.raises(OptionError, match=r"others have none(.|\n)*without label: *1"):
        layout.collator(tokenizer, verbalizer=words)([{"a": "the cat", "label": 1}, {"a": "the dog"}])

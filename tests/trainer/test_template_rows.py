"""Rows of a template in a Trainer with only the callback: mapped rows, raw rows, classes as words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokens
import torch
import training
import transformers as tf
import zoo

import softhooks
from softhooks import Layout, OptionError, PTuning, SoftPromptCallback, Verbalizer

TEMPLATE = "{premise} question : {hypothesis} ? {soft:3} answer : {mask} ."
PLAIN = "{premise} question : {hypothesis} ? {soft:3} answer : {target}"
ROWS = [
    {"premise": p, "hypothesis": h, "label": i % 2, "idx": i, "target": ["yes", "no maybe"][i % 2]}
    for i, (p, h) in enumerate([("hello world", "cat"), ("red", "dog"), ("a b c", "c"), ("it was great", "a red dog")])
]
FORMS = ["dataset", "list"]
WAYS = ["mapped", "collated"]
each_form = pytest.mark.parametrize("form", FORMS)
each_way = pytest.mark.parametrize("way", WAYS)


def arguments(folder: Path, **options: Any) -> tf.TrainingArguments:
    """Arguments of a script without options for columns or collators."""
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
    }
    return tf.TrainingArguments(str(folder), **{**training.QUIET, **settings, **options})


def rows_and_collator(
    layout: Layout, tokenizer: Any, form: str, way: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The two ways that docs/layouts.md shows."""
    if way == "mapped":
        mapper = layout.mapper(tokenizer, max_length=256, **options)
        if form == "list":
            return [{**row, **mapper(row)} for row in ROWS], {}
        return pytest.importorskip("datasets").Dataset.from_list(ROWS).map(mapper), {}
    data = ROWS if form == "list" else pytest.importorskip("datasets").Dataset.from_list(ROWS)
    return data, {"data_collator": layout.collator(tokenizer, max_length=256, **options)}


def trained(trainer: tf.Trainer) -> tf.Trainer:
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    assert len(training.losses(trainer)) == 3
    return trainer


@each_form
@each_way
@pytest.mark.parametrize("batched", [False, True])
def test_a_masked_language_model_with_classes_as_words(tmp_path: Path, form: str, way: str, batched: bool) -> None:
    """One call makes the labels: the mapper's, or the collator's; predictions are the classes' scores."""
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    words = Verbalizer(["yes", "no"], tokenizer)
    rows, more = rows_and_collator(layout, tokenizer, form, way, verbalizer=words)
    if batched:
        more["processing_class"] = tokenizer
    shapes: list[Any] = []

    def compute_metrics(given: Any) -> dict[str, float]:
        shapes.append((given.predictions.shape, given.label_ids.shape[0]))
        return {"accuracy": float((given.predictions.argmax(-1) == words.classes(given.label_ids).numpy()).mean())}

    trainer = tf.Trainer(
        zoo.build("bert", "masked"),
        arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        compute_loss_func=words,
        preprocess_logits_for_metrics=words.scores_at_labels,
        compute_metrics=compute_metrics,
        callbacks=[SoftPromptCallback(PTuning(layout=layout))],
        **more,
    )
    trained(trainer)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    predicted = trainer.predict(rows)
    assert shapes == [((4, 2), 4)] * 2
    assert predicted.predictions.shape == (4, 2)
    assert words.classes(predicted.label_ids).tolist() == [0, 1, 0, 1]
    trainer.model.eval()
    for number, row in enumerate(ROWS):
        batch = layout.collator(tokenizer)([{**row, "label": "none"}])
        with torch.no_grad():
            by_hand = words.scores(trainer.model(**batch).logits, batch["input_ids"])[0]
        np.testing.assert_allclose(predicted.predictions[number], by_hand.numpy(), rtol=1e-4, atol=1e-4)


@each_form
@each_way
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_classifier(tmp_path: Path, form: str, way: str, arch: str) -> None:
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    if arch == "llama":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rows, more = rows_and_collator(layout, tokenizer, form, way)
    trainer = tf.Trainer(
        zoo.build(arch, "sequence"),
        arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())},
        callbacks=[SoftPromptCallback(PTuning(layout=layout))],
        **more,
    )
    trained(trainer)
    assert "eval_accuracy" in trainer.evaluate()
    predicted = trainer.predict(rows)
    assert predicted.label_ids.tolist() == [0, 1, 0, 1]
    with torch.no_grad():
        for number, row in enumerate(ROWS):
            logits = trainer.model.eval()(**layout.collator(tokenizer)([row])).logits[0]
            np.testing.assert_allclose(predicted.predictions[number], logits.numpy(), rtol=1e-4, atol=1e-4)


@each_form
@each_way
def test_a_language_model_that_predicts_a_field(tmp_path: Path, form: str, way: str) -> None:
    tokenizer, layout = tokens.merged(), Layout(PLAIN)
    rows, more = rows_and_collator(layout, tokenizer, form, way, target="target")
    trainer = tf.Trainer(
        zoo.build("llama", vocab_size=len(tokenizer)),
        arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[SoftPromptCallback(PTuning(layout=layout))],
        **more,
    )
    trained(trainer)
    loss = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 4
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape
    kept = predicted.label_ids[:, 1:] != -100
    logits = torch.from_numpy(predicted.predictions[:, :-1][kept])
    by_hand = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(predicted.predictions[i : i + 2, :-1][kept[i : i + 2]]),
            torch.from_numpy(predicted.label_ids[i : i + 2, 1:][kept[i : i + 2]]),
        )
        for i in (0, 2)
    ]
    assert logits.shape[0] == kept.sum()
    assert loss == pytest.approx(float(sum(by_hand) / 2), rel=1e-4)


@each_way
def test_a_language_model_with_classes_as_words(tmp_path: Path, way: str) -> None:
    tokenizer, layout = tokens.merged(), Layout("{premise} question : {hypothesis} ? {soft:3} answer : {mask}")
    words = Verbalizer(["bad", "great"], tokenizer, causal=True)
    rows, more = rows_and_collator(layout, tokenizer, "list", way, verbalizer=words)
    trainer = tf.Trainer(
        zoo.build("llama", vocab_size=len(tokenizer)),
        arguments(tmp_path),
        train_dataset=rows,
        compute_loss_func=words,
        preprocess_logits_for_metrics=words.scores_at_labels,
        callbacks=[SoftPromptCallback(PTuning(layout=layout))],
        **more,
    )
    predicted = trained(trainer).predict(rows)
    assert words.classes(predicted.label_ids).tolist() == [0, 1, 0, 1]
    batch = layout.collator(tokenizer, verbalizer=words)([{**row, "label": None} for row in ROWS])
    with torch.no_grad():
        scores = words.scores(trainer.model.eval()(**batch).logits, batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(predicted.predictions, scores.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_default_collators_pad_the_rows_of_a_few_shot_context(tmp_path: Path, named: bool) -> None:
    """`ContextAwarePromptTuning.render` gives rows of different lengths, with a label for each token."""
    tokenizer = tokens.merged()
    shots = [{"text": "the cat was great", "label": "great"}, {"text": "it was", "label": "bad"}]
    method = softhooks.ContextAwarePromptTuning(
        examples=shots, template="Text: {text} Answer: {label}", tokenizer=tokenizer, leave_one_out=True
    )
    rows = [method.render(shot) for shot in shots]
    trainer = tf.Trainer(
        zoo.build("llama", vocab_size=len(tokenizer)),
        arguments(tmp_path),
        train_dataset=rows,
        callbacks=[SoftPromptCallback(method)],
        processing_class=tokenizer if named else None,
    )
    trained(trainer)
    expected = tf.DataCollatorForSeq2Seq(tokenizer)(rows)
    found = trainer.data_collator(rows)
    kept = expected["attention_mask"].bool()
    for name in ("attention_mask", "labels", "example_ids"):
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(found["input_ids"][kept], expected["input_ids"][kept])


def test_both_ways_train_the_same(tmp_path: Path) -> None:
    losses = []
    for number, (way, form, named) in enumerate((w, f, n) for w in WAYS for f in FORMS for n in (False, True)):
        tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
        words = Verbalizer(["yes", "no"], tokenizer)
        rows, more = rows_and_collator(layout, tokenizer, form, way, verbalizer=words)
        more |= {"processing_class": tokenizer} if named else {}
        torch.manual_seed(0)
        trainer = tf.Trainer(
            zoo.build("bert", "masked"),
            arguments(tmp_path / str(number)),
            train_dataset=rows,
            compute_loss_func=words,
            callbacks=[SoftPromptCallback(PTuning(layout=layout))],
            **more,
        )
        losses.append(training.losses(trained(trainer)))
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_of_the_trainer_pads_at_its_own_side(tmp_path: Path, side: str) -> None:
    tokenizer, layout = tokens.merged(), Layout(PLAIN)
    tokenizer.padding_side = side
    rows, _ = rows_and_collator(layout, tokenizer, "list", "mapped", target="target")
    trainer = tf.Trainer(
        zoo.build("llama", vocab_size=len(tokenizer)),
        arguments(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[SoftPromptCallback(PTuning(layout=layout))],
    )
    batch = trainer.data_collator([{k: v for k, v in row.items() if not isinstance(v, str)} for row in rows])
    expected = layout.collator(tokenizer, target="target")(ROWS)
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


def test_rows_of_one_length_keep_the_labels_of_their_words(tmp_path: Path) -> None:
    """A tokenizer's collator would replace `labels` by the column `label`, the index of the class."""
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    rows, _ = rows_and_collator(layout, tokenizer, "list", "mapped", verbalizer=Verbalizer(["yes", "no"], tokenizer))
    callbacks = [SoftPromptCallback(PTuning(layout=layout))]
    trainer = tf.Trainer(
        zoo.build("bert", "masked"), arguments(tmp_path), processing_class=tokenizer, callbacks=callbacks
    )
    row = {name: value for name, value in rows[0].items() if not isinstance(value, str)}
    batch = trainer.data_collator([row])
    assert batch["labels"].tolist() == [row["labels"]]
    assert "label" not in batch


def test_a_collator_of_the_scripts_own_is_left_alone(tmp_path: Path) -> None:
    layout, tokenizer = Layout(TEMPLATE), tokens.masked()
    own = tf.DataCollatorWithPadding(tokens.masked())
    callbacks = [SoftPromptCallback(PTuning(layout=layout))]
    trainer = tf.Trainer(
        zoo.build("bert", "sequence"),
        arguments(tmp_path),
        data_collator=own,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    assert trainer.data_collator is own
    plain = tf.Trainer(
        zoo.build("bert", "sequence"), arguments(tmp_path), callbacks=[SoftPromptCallback(softhooks.PromptTuning(2))]
    )
    assert plain.data_collator is tf.default_data_collator


def test_a_callback_that_comes_after_an_evaluation(tmp_path: Path) -> None:
    """By then the Trainer has determined its columns, without the prompt's."""
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    rows, _ = rows_and_collator(layout, tokenizer, "list", "mapped")
    trainer = tf.Trainer(zoo.build("bert", "sequence"), arguments(tmp_path, save_strategy="no"), train_dataset=rows)
    trainer.evaluate([rows[0]])
    trainer.add_callback(SoftPromptCallback(PTuning(layout=layout)))
    trained(trainer)


def test_rows_that_have_lost_their_fields_are_told_so(tmp_path: Path) -> None:
    """In a Trainer without the callback, over a prompt that a script has attached."""
    model, tokenizer, layout = zoo.build("bert", "sequence"), tokens.masked(), Layout(TEMPLATE)
    with softhooks.attach(model, PTuning(layout=layout)):
        trainer = tf.Trainer(model, arguments(tmp_path), train_dataset=ROWS, data_collator=layout.collator(tokenizer))
        with pytest.raises(
            OptionError, match=r"Trainer removes columns(.|\n)*SoftPromptCallback(.|\n)*remove_unused_columns"
        ):
            next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("tensors", [False, True])
def test_a_loop_of_ones_own(tensors: bool) -> None:
    """`DataLoader(rows, collate_fn=layout.collator(tokenizer))`, on raw rows, on mapped ones, and on a data set of tensors."""
    tokenizer, layout = tokens.masked(), Layout(TEMPLATE)
    words = Verbalizer(["yes", "no"], tokenizer)
    data = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    mapped = data.map(layout.mapper(tokenizer, max_length=256, verbalizer=words))
    if tensors:
        mapped = mapped.with_format(
            "torch", columns=["input_ids", "attention_mask", "token_type_ids", "soft_slots", "labels"]
        )
    batches = [
        list(torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collator))
        for rows, collator in (
            (ROWS, layout.collator(tokenizer, verbalizer=words)),
            (data, layout.collator(tokenizer, verbalizer=words)),
            (mapped, layout.collator(tokenizer)),
            (data.map(layout.mapper(tokenizer)), layout.collator(tokenizer, verbalizer=words)),
        )
    ]
    for found in batches[1:]:
        for one, other in zip(batches[0], found, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    with softhooks.attach(zoo.build("bert", "masked"), PTuning(layout=layout)) as prompt:
        for batch in batches[0]:
            labels = batch.pop("labels")
            words(prompt.model(**batch), labels).backward()
        assert all(parameter.grad is not None for parameter in prompt.parameters())


def test_scores_need_one_label_a_row() -> None:
    words = Verbalizer([5, 6])
    logits, labels = torch.randn(3, 4, 9), torch.full((3, 4), -100)
    labels[0, 1] = labels[1, 2] = 5
    with pytest.raises(OptionError, match=r"one label that is not -100(.|\n)*rows: *2"):
        words.scores_at_labels(logits, labels)
    labels[2, 0] = 7
    assert torch.equal(words.scores_at_labels(logits, labels)[1], logits[1, 2, [5, 6]])
    with pytest.raises(OptionError, match=r"labels contain \[7\]"):
        words.classes(labels)
    causal = Verbalizer([5, 6], causal=True)
    labels[2] = torch.tensor([-100, 6, -100, -100])
    assert torch.equal(
        causal.scores_at_labels(logits, labels), torch.stack([logits[0, 0], logits[1, 1], logits[2, 0]])[:, [5, 6]]
    )
    assert causal.classes(labels.numpy()).tolist() == [0, 0, 1]

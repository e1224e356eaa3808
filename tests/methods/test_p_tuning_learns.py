"""P-tuning learns: a frozen model knows three tasks, and slots next to an anchor learn which one is meant."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokens
import torch
import training
import transformers as tf
import zoo

import softhooks
from softhooks import Layout, PTuning, SoftPromptCallback, Verbalizer

LETTERS = list("abcdefgh")
TASKS = {"red": 0, "blue": 1, "cat": 2}
"""The word that makes the model repeat the first, the second or the third letter."""


def texts(count: int, seed: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(seed)
    return [[LETTERS[i] for i in row] for row in torch.randint(8, (count, 3), generator=generator).tolist()]


@cache
def schooled(arch: str, head: str) -> tuple[Any, Any]:
    """A model that was taught the tasks by their words, and its tokenizer."""
    tokenizer = tokens.masked()
    model = zoo.build(arch, head, hidden_size=64, intermediate_size=128, num_attention_heads=4).train()
    model.apply(model._init_weights)
    rows, answers = [], []
    generator = torch.Generator().manual_seed(0)
    for letters in texts(2400, seed=1):
        word = list(TASKS)[int(torch.randint(3, (1,), generator=generator))]
        answer = letters[TASKS[word]]
        told = "[MASK]" if head == "masked" else answer
        rows.append(f"{' '.join(letters)} ? {word} : {told}")
        answers.append(tokenizer.convert_tokens_to_ids(answer))
    batch = tokenizer(rows, return_tensors="pt")
    at = -2  # before [SEP]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, at] = torch.tensor(answers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(400):
        own = torch.arange(step * 64, step * 64 + 64) % len(rows)
        call = {"input_ids": batch["input_ids"][own], "attention_mask": batch["attention_mask"][own]}
        model(**call, labels=labels[own]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def examples(count: int, seed: int, task: int) -> list[dict[str, Any]]:
    return [
        {"letters": " ".join(row), "answer": row[task], "label": LETTERS.index(row[task])} for row in texts(count, seed)
    ]


def trained(folder: Path, model: Any, method: PTuning, data: list[Any], collator: Any, **more: Any) -> Any:
    callback = SoftPromptCallback(method)
    options = {**training.QUIET, "max_steps": 120, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
    arguments = tf.TrainingArguments(str(folder), **options, remove_unused_columns=False)
    trainer = tf.Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[callback], **more)
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    model.eval()
    assert callback.report is not None  # nothing frozen has moved
    return callback.soft_prompt


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
def test_a_masked_model_learns_which_task_is_meant(tmp_path: Path, encoder: Any) -> None:
    model, tokenizer = schooled("bert", "masked")
    words = Verbalizer(LETTERS, tokenizer)
    layout = Layout("{letters} ? {soft:2} : {mask}")
    test = layout.collator(tokenizer, verbalizer=words)(examples(200, seed=3, task=2))
    labels = test.pop("labels")
    classes = torch.tensor([row["label"] for row in examples(200, seed=3, task=2)])

    @torch.no_grad()
    def accuracy(**call: Any) -> float:
        scores = words.scores(model(**call).logits, call["input_ids"])
        return float((scores.argmax(-1) == classes).float().mean())

    hard = tokenizer([f"{' '.join(row)} ? cat : [MASK]" for row in texts(200, seed=3)], return_tensors="pt")
    without = {key: value for key, value in test.items() if key != "soft_slots"}
    assert accuracy(**hard) > 0.95
    assert accuracy(**without) < 0.6
    collator = layout.collator(tokenizer, verbalizer=words)
    prompt = trained(
        tmp_path,
        model,
        PTuning(layout=layout, encoder=encoder),
        examples(64, seed=2, task=2),
        collator,
        compute_loss_func=words,
    )
    assert accuracy(**test) > 0.95
    prompt.fold()
    assert accuracy(**test) > 0.95
    with torch.no_grad():
        assert float(words(model(**test), labels)) < 0.3
    prompt.remove()


@pytest.mark.parametrize("form", ["template", "insert"])
def test_a_language_model_learns_which_task_is_meant(tmp_path: Path, form: str) -> None:
    """The same slots in rows of a layout and in rows that a script has tokenized itself; then generation."""
    model, tokenizer = schooled("llama", "causal")
    template = Layout("{letters} ? {soft:2} : {answer}")
    inserted = Layout.insert(after={"?": 2}, tokenizer=tokenizer)
    layout = template if form == "template" else inserted
    tokenizer.padding_side = "left"
    collator = template.collator(tokenizer, target="answer")

    def without_column(rows: Any) -> Any:
        return {key: value for key, value in collator(rows).items() if key != "soft_slots"}

    made = collator if form == "template" else without_column
    answers = [row[2] for row in texts(100, seed=3)]
    prompts = made([{**row, "answer": ""} for row in examples(100, seed=3, task=2)])
    prompts = {
        k: v[:, :-1] if v.shape[1] == prompts["input_ids"].shape[1] else v for k, v in prompts.items()
    }  # no [SEP]
    prompts = {key: value for key, value in prompts.items() if key not in ("labels", "token_type_ids")}

    def accuracy(**call: Any) -> float:
        found = model.generate(**call, max_new_tokens=1, do_sample=False, pad_token_id=0)[:, -1].tolist()
        said = tokenizer.convert_ids_to_tokens(found)
        return sum(map(str.__eq__, said, answers)) / len(answers)

    assert accuracy(**{key: value for key, value in prompts.items() if key != "soft_slots"}) < 0.6

    def typeless(rows: Any) -> Any:
        return {key: value for key, value in made(rows).items() if key != "token_type_ids"}

    prompt = trained(tmp_path, model, PTuning(layout=layout), examples(64, seed=2, task=2), typeless)
    assert accuracy(**prompts) > 0.95
    with softhooks.disabled(model):
        assert accuracy(**{key: value for key, value in prompts.items() if key != "soft_slots"}) < 0.6
    prompt.remove()

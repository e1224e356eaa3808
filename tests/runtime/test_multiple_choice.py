"""Multiple-choice models: rows of choices, [B, C, T], that the model flattens before its stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokens
import torch
import transformers as tf
import zoo
from torch import Tensor

import softhooks
from softhooks import (
    Layout,
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    SoftPromptCallback,
    UnsupportedModeError,
)

ARCHITECTURES = (
    "bert", "roberta", "albert", "distilbert", "electra", "mpnet", "deberta-v2", "megatron-bert", "rembert", "roformer",
    "modernbert",
)  # fmt: skip
ROWS, CHOICES, COLUMNS = 2, 3, 6


def build(arch: str = "bert", seed: int = 0) -> Any:
    config = zoo.CONFIGS[arch]()
    torch.manual_seed(seed)
    model = tf.AutoModelForMultipleChoice.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def batch(padded: bool = False) -> dict[str, Tensor]:
    ids = zoo.text(ROWS * CHOICES, COLUMNS).view(ROWS, CHOICES, COLUMNS)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "method", [PromptTuning(3), PrefixTuning(3), PTuningV2(3), LlamaAdapter(3)], ids=lambda m: m.kind
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_choice_is_scored_as_a_row_of_its_own_would_be(arch: str, method: Any) -> None:
    model, call = build(arch), batch(padded=True)
    with torch.no_grad(), softhooks.attach(model, method) as prompt:
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        found = model(**call).logits
        assert found.shape == (ROWS, CHOICES)
        for row in range(ROWS):
            for choice in range(CHOICES):
                alone = {name: value[row : row + 1, choice : choice + 1] for name, value in call.items()}
                torch.testing.assert_close(model(**alone).logits[0, 0], found[row, choice], rtol=1e-4, atol=1e-5)
        with softhooks.disabled(model):
            assert not torch.allclose(model(**call).logits, found, atol=1e-4)


def test_slots_equal_rows_put_before_the_embeddings_by_hand() -> None:
    model, call = build("distilbert"), batch()
    with torch.no_grad(), softhooks.attach(model, PromptTuning(3), train_head=False) as prompt:
        found = model(**call).logits
        rows = prompt.encoder("embeddings")
        with softhooks.disabled(model):
            words = model.get_input_embeddings()(call["input_ids"])
            whole = torch.cat([rows.expand(ROWS, CHOICES, -1, -1), words], 2).flatten(0, 1)
            pooled = model.distilbert(
                inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2])
            ).last_hidden_state[:, 3]
            expected = model.classifier(torch.relu(model.pre_classifier(pooled))).view(ROWS, CHOICES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_name_a_prompt_for_every_choice_of_a_row() -> None:
    model, call = build(), batch()
    with torch.no_grad():
        softhooks.attach(model, PrefixTuning(3, init="random"), "one")
        softhooks.attach(model, PrefixTuning(4, init="random"), "two")
        for prompt in (softhooks.activate(model, "one"), softhooks.activate(model, "two")):
            for parameter in prompt.encoder.parameters():
                parameter.normal_()
        expected = []
        for row, name in enumerate(("two", "one")):
            softhooks.activate(model, name)
            expected.append(model(**{key: value[row : row + 1] for key, value in call.items()}).logits[0])
        with softhooks.rows(model, ["two", "one"]):
            found = model(**call).logits
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
            with pytest.raises(UnsupportedModeError, match="one prompt for each row"):
                model(**{key: value[:1] for key, value in call.items()})
        with softhooks.rows(model, ["one"] * ROWS * CHOICES), pytest.raises(UnsupportedModeError, match="each row"):
            model(**call)


def test_a_task_and_a_context_are_told_for_a_row() -> None:
    model, call = build(), batch()
    with torch.no_grad(), softhooks.attach(model, MultitaskPromptTuning(3, tasks=["a", "b"], rank=1)) as prompt:
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        found = model(**call, task_ids=torch.tensor([1, 0])).logits
        for row, task in enumerate((1, 0)):
            alone = {name: value[row : row + 1] for name, value in call.items()}
            expected = model(**alone, task_ids=torch.tensor([task])).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), softhooks.attach(model, LlamaAdapter(3)) as prompt:
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        context = torch.randn(ROWS, 32)
        found = model(**call, prompt_context=context).logits
        for row in range(ROWS):
            alone = {name: value[row : row + 1] for name, value in call.items()}
            expected = model(**alone, prompt_context=context[row : row + 1]).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_a_layout_finds_its_anchors_in_each_choice() -> None:
    model, call = build(), batch()
    layout = Layout.insert(start=1, after=dict.fromkeys(range(4, 16), 1), missing="skip")
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        for parameter in prompt.encoder.parameters():
            parameter.normal_()
        found = model(**call).logits
        one = model(**{name: value[1:, 2:] for name, value in call.items()}).logits
    torch.testing.assert_close(found[1, 2], one[0, 0], rtol=1e-4, atol=1e-5)


def test_the_head_is_copied_saved_and_loaded(tmp_path: Path) -> None:
    model, call = build(), batch()
    call["labels"] = torch.tensor([2, 0])
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        optimizer = torch.optim.SGD(prompt.parameters(), lr=0.5)
        losses = []
        for _ in range(8):
            loss = model(**call).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert list(prompt.heads) == ["classifier"]
        prompt.verify_frozen()
        with torch.no_grad():
            expected = model(**call).logits
        prompt.save_pretrained(tmp_path)
    fresh = build()
    softhooks.load(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**call).logits, expected)


def test_a_trainer_trains_on_what_the_collator_for_multiple_choice_makes(tmp_path: Path) -> None:
    model, tokenizer = build(), tokens.tokenizer()
    rows = [
        {"input_ids": [[4 + row, 5, 6], [7, 8 + choice]], "attention_mask": [[1, 1, 1], [1, 1]], "label": row % 2}
        for row in range(4)
        for choice in range(2)
    ]
    trainer = tf.Trainer(
        model=model,
        args=tf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            learning_rate=0.1, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=tf.DataCollatorForMultipleChoice(tokenizer=tokenizer),
        callbacks=[SoftPromptCallback(PromptTuning(3))],
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    for name, value in model.state_dict().items():
        frozen = not name.startswith("soft_prompt.")
        assert torch.equal(value, before[name]) == frozen, name

"""A model that needs more than token ids gets an example from the Trainer's training rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import softhooks
from softhooks import SoftPromptCallback
from softhooks.runtime.prompted_model import prompted_model_of

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class BoxBert(BertForSequenceClassification):
    """A BERT that needs a bounding box for each token, as models of documents do."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, bbox: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        words = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(words[:, 0] + bbox.float().mean((1, 2))[:, None])
        loss = {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        return loss | {"logits": logits}


def build() -> BoxBert:
    torch.manual_seed(0)
    return BoxBert(BertConfig(vocab_size=64, **SIZE)).eval()


def rows() -> list[dict[str, Any]]:
    source = random.Random(0)
    return [
        {
            "input_ids": [source.randrange(5, 60) for _ in range(7)],
            "bbox": [[source.randrange(9) for _ in range(4)] for _ in range(7)],
            "labels": source.randrange(2),
        }
        for _ in range(8)
    ]


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Any:
        return iter(rows())


DATASETS: dict[str, Any] = {
    "list": rows,
    "datasets": lambda: Dataset.from_list([row | {"text": "not for the model"} for row in rows()]),
    "stream": Stream,
}


def noisy(features: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that draws random numbers, as collators with masks do."""
    torch.rand(3), np.random.rand(3), random.random()
    return {name: torch.tensor([row[name] for row in features]) for name in features[0]}


def train(
    folder: Path, dataset: Any, method: softhooks.Method, example: Any = None
) -> tuple[BoxBert, SoftPromptCallback]:
    model, callback = build(), SoftPromptCallback(method, example=example)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, per_device_train_batch_size=2,
        learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=noisy, callbacks=[callback]).train()
    return model, callback


@pytest.mark.parametrize("kind", DATASETS)
def test_the_callback_takes_an_example_from_the_rows(kind: str, tmp_path: Path) -> None:
    """Training is the same, bit for bit, as with the example from the user."""
    method = softhooks.PrefixTuning(4)
    _, callback = train(tmp_path, DATASETS[kind](), method)
    assert callback.soft_prompt is not None
    callback.soft_prompt.verify_frozen()
    given = {name: torch.tensor([rows()[0][name]]) for name in rows()[0]}
    _, other = train(tmp_path, DATASETS[kind](), method, given)
    assert other.soft_prompt is not None
    for mine, theirs in zip(callback.soft_prompt.parameters(), other.soft_prompt.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()


def test_the_columns_of_the_method_are_kept(tmp_path: Path) -> None:
    """The example has them, although the forward does not accept them yet; the training rows have them too."""
    dataset = Dataset.from_list([row | {"task_ids": number % 2} for number, row in enumerate(rows())])
    method = softhooks.MultitaskPromptTuning(3, tasks=["a", "b"], init="random")
    _, callback = train(tmp_path, dataset, method)
    assert callback.soft_prompt is not None
    assert all(parameter.isfinite().all() for parameter in callback.soft_prompt.parameters())


def test_an_iterator_keeps_its_first_row(tmp_path: Path) -> None:
    """Its rows come only once, so the model is refused."""

    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rest = iter(rows())

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(self.rest)

    dataset = Once()
    with pytest.raises(softhooks.UnsupportedModelError, match="example=batch"):
        train(tmp_path, dataset, softhooks.PrefixTuning(4))
    assert next(dataset) == rows()[0]


def test_the_trainer_reads_the_columns_of_the_forward_later(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback = SoftPromptCallback(softhooks.PrefixTuning(4))
    trainer = Trainer(model=build(), args=arguments, train_dataset=rows(), data_collator=noisy, callbacks=[callback])
    assert callback.soft_prompt is not None
    assert trainer._signature_columns is None


def test_without_rows_the_model_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model = build()
    with pytest.raises(softhooks.UnsupportedModelError, match="example=batch"):
        Trainer(model=model, args=arguments, callbacks=[SoftPromptCallback(softhooks.PrefixTuning(4))])
    assert prompted_model_of(model) is None

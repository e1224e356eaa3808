"""An example batch: probe forwards of models that need more than token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import softhooks
from softhooks.backbone.example import Example, example_of
from softhooks.runtime.prompted_model import prompted_model_of


class BoxBert(BertForSequenceClassification):
    """A BERT that needs a bounding box for each token, as models of documents do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, bbox: Tensor) -> Tensor:  # type: ignore[override]
        words = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(words[:, 0] + bbox.float().mean((1, 2))[:, None])


@pytest.fixture
def model() -> BoxBert:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BoxBert(BertConfig(vocab_size=64, **size)).eval()


def batch(rows: int = 2, columns: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (rows, columns))
    boxes = torch.randint(0, 9, (rows, columns, 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "bbox": boxes, "labels": torch.zeros(rows)}


@pytest.mark.parametrize("method", [softhooks.PrefixTuning(4), softhooks.PromptTuning(4, init="random")], ids=str)
def test_a_model_that_needs_boxes(model: BoxBert, method: softhooks.Method) -> None:
    """The prompt is refused without an example, with a remedy that works; with one it changes the output."""
    with pytest.raises(softhooks.UnsupportedModelError, match="example=batch"):
        softhooks.attach(model, method)
    given = batch()
    given.pop("labels")
    before = model(**given)
    with softhooks.attach(model, method, example=batch()):
        assert not torch.equal(model(**given), before)
    assert torch.equal(model(**given), before)


def test_every_way_of_use_takes_an_example(model: BoxBert, tmp_path: Path) -> None:
    """The decorator, a Trainer's callback and `load` attach with the example; the loaded prompt computes the same."""
    given = batch()
    given.pop("labels")

    @softhooks.tune(softhooks.PrefixTuning(4), save_to=tmp_path, example=given)
    def tuned(model: BoxBert) -> Tensor:
        return model(**given)

    expected = tuned(model)
    with softhooks.load(model, tmp_path, example=given):
        assert torch.equal(model(**given), expected)
    with pytest.raises(softhooks.UnsupportedModelError, match="example=batch"):
        softhooks.load(model, tmp_path)
    callback = softhooks.SoftPromptCallback(softhooks.PrefixTuning(4), example=given)
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model=model, args=arguments, train_dataset=[given], callbacks=[callback])
    assert callback.soft_prompt is not None


def test_the_example_itself_is_run_with_the_prompt() -> None:
    """A model that runs on ids alone is still tried with the example, and left as it was if the prompt does not support it."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **size)).eval()
    ids = torch.randint(5, 60, (2, 7))
    every_pair = torch.ones(2, 7, 7, dtype=torch.long)  # a mask for each query, which says nothing about slots
    assert model(input_ids=ids, attention_mask=every_pair).logits.shape == (2, 2)
    with pytest.raises(softhooks.AttachError, match="mask"):
        softhooks.attach(
            model, softhooks.PromptTuning(4, init="random"), example={"input_ids": ids, "attention_mask": every_pair}
        )
    assert prompted_model_of(model) is None
    softhooks.attach(model, softhooks.PromptTuning(4, init="random"), example={"input_ids": ids}).remove()


def test_an_example_that_the_model_cannot_take(model: BoxBert) -> None:
    """The error names the arguments of the example and the model's own error."""
    with pytest.raises(softhooks.UnsupportedModelError, match="bbox, images of the example") as caught:
        softhooks.attach(model, softhooks.PrefixTuning(4), example=batch() | {"images": torch.ones(2, 3)})
    assert "unexpected keyword argument 'images'" in str(caught.value)


def test_arguments_fit_the_text() -> None:
    """Per-token arguments get the text's columns, others only its rows; text and labels of the batch are left out."""
    pixels = torch.ones(2, 7, 8)  # with as many channels as the text has tokens
    example = example_of(batch() | {"pixels": pixels, "scale": 2.0}, torch.device("cpu"))
    assert set(example.others) == {"bbox", "pixels", "scale"}
    for columns in (3, 12):
        made = example.arguments(torch.ones(5, columns, dtype=torch.long))
        assert made["bbox"].shape == (5, columns, 4)
        assert torch.equal(made["bbox"][3, -1], example.others["bbox"][0, min(columns, 7) - 1])
        assert made["pixels"].shape == (5, 7, 8)
        assert made["scale"] == 2.0


def test_choices_and_decoder() -> None:
    """Multiple choice repeats a row for each choice; an encoder-decoder gets decoder ids."""
    ids = torch.arange(6).view(2, 3)
    assert Example(choices=2).arguments(ids, ids)["attention_mask"].shape == (2, 2, 3)
    made = Example(is_encoder_decoder=True).arguments(ids)
    assert made["decoder_input_ids"].tolist() == [[2, 0, 1], [5, 3, 4]]
    assert torch.equal(Example(is_encoder_decoder=True).arguments(ids, decoder=ids)["decoder_input_ids"], ids)

"""Pipelines of transformers use the active prompt and give the model's own numbers, text by text and in padded batches.

Text generation stands in `test_generate_outputs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tokens
import torch
import transformers as tf
import zoo
from torch import Tensor

import softhooks
from softhooks import PrefixTuning, PromptTuning

TEXTS = ["the cat was [MASK]", "it was a great [MASK], hello world"]
METHODS = {"prompt": PromptTuning(4), "prefix": PrefixTuning(4)}


@dataclass(frozen=True)
class Task:
    """A task of pipelines.

    Attributes:
        model: made for it, bare.
        read: the numbers in a pipeline's answer for one text.
        expected: the same numbers from the first output of the model for one text, [1, T, ...] or [1, classes], and its ids.
        options: of the call.
    """

    model: Callable[[], Any]
    read: Callable[[Any], Tensor]
    expected: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any]


def _scores(answer: Any) -> Tensor:
    return torch.tensor([found["score"] for found in answer])


def _best(output: Tensor, ids: Tensor) -> Tensor:
    return output[0, 1:-1].softmax(-1).amax(-1)  # of all tokens but [CLS] and [SEP]


def _at_the_mask(output: Tensor, ids: Tensor) -> Tensor:
    return output[0, ids[0] == tokens.masked().mask_token_id][0].softmax(-1).topk(7).values


TASKS = {
    "text-classification": Task(
        lambda: zoo.build("bert", "sequence"),
        lambda answer: torch.tensor([found["score"] for found in sorted(answer, key=lambda found: found["label"])]),
        lambda output, ids: output[0].softmax(-1),
        {"top_k": None},
    ),
    "token-classification": Task(lambda: zoo.build("bert", "tokens"), _scores, _best, {}),
    "fill-mask": Task(lambda: zoo.build("bert", "masked"), _scores, _at_the_mask, {"top_k": 7}),
    "feature-extraction": Task(
        lambda: zoo.build("bert", "masked").bert,
        lambda answer: answer[0],
        lambda output, ids: output[0],
        {"return_tensors": True},
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_a_pipeline_answers_with_the_prompt_that_is_on(task: str, method: str) -> None:
    one, tokenizer = TASKS[task], tokens.masked()
    model = one.model().eval()
    call: dict[str, Any] = {**one.options, "batch_size": 2}
    with softhooks.attach(model, METHODS[method]):
        pipeline = tf.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        prompted = pipeline(TEXTS, **call)
        with softhooks.disabled(model):
            bare = pipeline(TEXTS, **call)
        encoded = [tokenizer(text, return_tensors="pt") for text in TEXTS]
        expected = [one.expected(model(**text)[0], text["input_ids"]) for text in encoded]
    for answer, plain, numbers in zip(prompted, bare, expected, strict=True):
        found, other = one.read(answer), one.read(plain)
        if task == "feature-extraction":  # of the padding too
            found, other = found[: len(numbers)], other[: len(numbers)]
        torch.testing.assert_close(found, numbers, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(other, numbers, rtol=1e-3)

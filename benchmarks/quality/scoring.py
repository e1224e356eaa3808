"""The score of each row: 1 or 0 for a class that is right or wrong, and ROUGE-L for a generated text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import DynamicCache

from benchmarks.quality.inputs import DecoderInputs, EncoderInputs
from benchmarks.quality.task import Row
from softhooks.compat.cache_argument import CACHE
from softhooks.demo.language_model.predict import follow_context

BATCH = 16


@torch.no_grad()
def score_encoder(model: Any, inputs: EncoderInputs, rows: Sequence[Row]) -> list[float]:
    """Score a sequence classifier."""
    model.eval()
    dataset = inputs.dataset(rows)
    scores: dict[int, float] = {}
    for indices in by_length([len(row["input_ids"]) for row in dataset.rows]):
        batch = inputs.collator([dataset[index] for index in indices])
        labels = batch.pop("labels")
        right = model(**batch).logits.argmax(-1) == labels
        scores.update(zip(indices, right.float().tolist(), strict=True))
    return [scores[index] for index in range(len(rows))]


@torch.no_grad()
def score_decoder(model: Any, inputs: DecoderInputs, rows: Sequence[Row], context: Sequence[int] = ()) -> list[float]:
    """Score a language model.

    Args:
        context: ids before every row; their keys and values are computed once.
    """
    model.eval()
    questions = [inputs.question_ids(row) for row in rows]
    cache = model(input_ids=torch.tensor([context]), use_cache=True)[CACHE] if context else None
    scores: dict[int, float] = {}
    for indices in by_length([len(ids) for ids in questions]):
        ids = torch.tensor([questions[index] for index in indices])
        mask = torch.ones_like(ids)
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        chosen = [rows[index] for index in indices]
        if inputs.task.generates:
            texts = _generate(model, inputs, call, context, cache)
            values = [rouge_l(text, row.answer) for text, row in zip(texts, chosen, strict=True)]
        else:
            if cache is not None:
                call |= follow_context(cache, mask, len(context))
            values = _right(model(**call).logits[:, -1], inputs, chosen)
        scores.update(zip(indices, values, strict=True))
    return [scores[index] for index in range(len(rows))]


def _right(logits: Tensor, inputs: DecoderInputs, rows: Sequence[Row]) -> list[float]:
    """Return 1 for each row whose class has the most likely first token, else 0."""
    classes = logits[:, inputs.first_label_ids()].argmax(-1).tolist()
    return [float(inputs.task.labels[index] == row.answer) for index, row in zip(classes, rows, strict=True)]


def _generate(
    model: Any, inputs: DecoderInputs, call: dict[str, Any], context: Sequence[int], cache: DynamicCache | None
) -> list[str]:
    """Generate answers; the first line of each is kept.

    Args:
        cache: the keys and values of the context.
    """
    if cache is not None:
        repeated = torch.tensor(list(context)).expand(len(call["input_ids"]), -1)
        call = {
            "input_ids": torch.cat([repeated, call["input_ids"]], dim=1),
            "attention_mask": torch.cat([torch.ones_like(repeated), call["attention_mask"]], dim=1),
            CACHE: follow_context(cache, call["attention_mask"], len(context))[CACHE],
        }
    output = model.generate(
        **call,
        max_new_tokens=inputs.task.max_new_tokens,
        do_sample=False,
        pad_token_id=inputs.tokenizer.pad_token_id,
    )
    new = output[:, call["input_ids"].shape[1] :]
    texts: list[str] = inputs.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


def rouge_l(text: str, reference: str) -> float:
    """Return the F-measure of ROUGE-L, with stemming."""
    measure: float = _SCORER.score(reference, text)["rougeL"].fmeasure
    return measure


def by_length(lengths: Sequence[int], batch: int = BATCH) -> Iterator[list[int]]:
    """Yield the indices of batches of rows with equal lengths.

    No row is padded, because padding on the left would move PEFT's prompts away from the text, which its training has not seen.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for _, group in itertools.groupby(order, key=lambda index: lengths[index]):
        indices = list(group)
        for start in range(0, len(indices), batch):
            yield indices[start : start + batch]


_SCORER = RougeScorer(["rougeL"], use_stemmer=True)

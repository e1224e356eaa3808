"""Baselines that train no neural network: the most frequent class, tf-idf with logistic regression, and prompts of words."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from benchmarks.quality.inputs import DecoderInputs
from benchmarks.quality.scoring import rouge_l
from benchmarks.quality.task import Row, Task

CONTEXT_LIMIT = 1024
"""The most tokens of a few-shot context."""


def majority(task: Task, train: Sequence[Row], rows: Sequence[Row]) -> list[float]:
    """Answer with the most frequent class of the training rows."""
    [(answer, _)] = Counter(row.answer for row in train).most_common(1)
    return [float(row.answer == answer) for row in rows]


def first_sentence(task: Task, train: Sequence[Row], rows: Sequence[Row]) -> list[float]:
    """Answer with the first sentence of the text, a usual baseline of summarization; the scores are ROUGE-L."""
    return [rouge_l(row.text.split(". ")[0], row.answer) for row in rows]


def tfidf(task: Task, train: Sequence[Row], rows: Sequence[Row]) -> list[float]:
    """Fit a logistic regression on tf-idf of words and pairs of words."""
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=2000)
    )
    classifier.fit([row.text for row in train], [row.answer for row in train])
    predicted = classifier.predict([row.text for row in rows])
    return [float(answer == row.answer) for answer, row in zip(predicted, rows, strict=True)]


def few_shot_context(inputs: DecoderInputs, rows: Sequence[Row], examples: int | None = None) -> list[int]:
    """Return the ids of a context with examples.

    Args:
        examples: the number of examples of each class, or of all if answers are generated; None for as many as fit into
            `CONTEXT_LIMIT` tokens.
    """
    count = None if examples is None else examples * max(1, len(inputs.task.labels))
    return inputs.context(by_turns(inputs.task, rows)[:count], CONTEXT_LIMIT)


def by_turns(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Order rows so that the counts of a context's examples differ by at most one between classes.

    The order of the classes is shuffled in each round; a model would continue a repeated order instead of reading the text.
    """
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault("" if task.generates else row.answer, []).append(row)
    rounds = max(map(len, by_class.values()), default=0)
    generator = random.Random(len(rows))
    ordered: list[Row] = []
    for turn in range(rounds):
        members = [group[turn] for group in by_class.values() if turn < len(group)]
        generator.shuffle(members)
        ordered += members
    return ordered

"""Accuracy as a metric of `evaluate`; `evaluate.load("accuracy")` would download the same from the Hub."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """The share of predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their references.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def accuracy(predictions: Any, references: Any) -> dict[str, float]:
    """Compute the metric, without leaving a directory in the cache of `evaluate`."""
    with tempfile.TemporaryDirectory() as directory:
        result: dict[str, float] = Accuracy(keep_in_memory=True, cache_dir=directory).compute(
            predictions=predictions, references=references
        )
    return result

"""Baselines of the demo: the majority class, and logistic regression on the features of the frozen model."""

from __future__ import annotations

import time
import warnings
from collections import Counter

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from transformers import DataCollatorWithPadding, PreTrainedModel

from softhooks.demo.encoder.data import EncodedData, Rows
from softhooks.demo.encoder.report import Line
from softhooks.errors import SoftHooksError

FOLDS = 4
STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def majority_class(data: EncodedData) -> Line:
    """Predict the most frequent class of the training rows for every text."""
    [(label, _)] = Counter(data.train.labels).most_common(1)
    return Line("majority class", data.test.labels.count(label) / len(data.test), trained=0)


def logistic_regression(model: PreTrainedModel, data: EncodedData, batch_size: int) -> Line:
    """Fit a linear classifier on the mean-pooled hidden states of the unmodified model.

    The regularization strength is chosen by cross-validation on the training rows, with whole source files held out.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, GroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise SoftHooksError(
            "scikit-learn, which the demo needs for its logistic regression, is not installed.",
            "Install it: pip install 'softhooks[demo]'",
            missing=error.name,
        ) from error
    start = time.perf_counter()
    features = mean_pooled(model, data.train, data, batch_size)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": STRENGTHS},
        cv=GroupKFold(FOLDS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold may contain no rows of a small package
        search.fit(features, data.train.labels, groups=data.train.sources)
    classifier = search.best_estimator_[-1]
    accuracy = float(search.score(mean_pooled(model, data.test, data, batch_size), data.test.labels))
    trained = classifier.coef_.size + classifier.intercept_.size
    return Line("logistic regression *", accuracy, trained, time.perf_counter() - start)


@torch.inference_mode()
def mean_pooled(model: PreTrainedModel, rows: Rows, data: EncodedData, batch_size: int) -> npt.NDArray[np.float32]:
    """Average the last hidden states of each row over its tokens, excluding padding; the shape is [rows, H]."""
    model.eval()
    collate = DataCollatorWithPadding(data.tokenizer)
    pooled: dict[int, npt.NDArray[np.float32]] = {}
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for start in track(range(0, len(rows), batch_size), "features of the frozen model", transient=True):
        indices = by_length[start : start + batch_size]
        batch = collate([rows[index] for index in indices])
        batch.pop("labels")
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden = model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        means = ((hidden * weights).sum(1) / weights.sum(1)).float().cpu().numpy()
        pooled.update(zip(indices, means, strict=True))
    return np.stack([pooled[index] for index in range(len(rows))])

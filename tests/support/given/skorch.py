"""Names that the example of skorch expects."""

from __future__ import annotations

import functools
from typing import Any

import torch
import training
import zoo


def names() -> dict[str, Any]:
    """A function that makes a tiny model, and rows in the form that scikit-learn slices."""
    from skorch.helper import SliceDict

    rows = training.rows("sequence", 30)
    ids = torch.stack([row["input_ids"] for row in rows]).numpy()
    labels = torch.stack([row["labels"] for row in rows]).numpy()
    return {
        "load_model": functools.partial(zoo.build, "bert", "sequence"),
        "X": SliceDict(input_ids=ids),
        "y": labels,
        "torch": torch,
    }

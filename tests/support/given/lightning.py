"""Names that the example of `softhooks.integrations.lightning` expects."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import training
import zoo

import softhooks


def names() -> dict[str, Any]:
    """A tiny model and its data."""
    warnings.filterwarnings("ignore", module="lightning")
    loader = torch.utils.data.DataLoader(training.rows("causal"), batch_size=4)
    return {"model": zoo.build("llama"), "loader": loader, "softhooks": softhooks, "torch": torch}

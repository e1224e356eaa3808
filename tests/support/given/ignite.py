"""Names that the example of Ignite expects."""

from __future__ import annotations

from typing import Any

import torch
import training
import zoo


def names() -> dict[str, Any]:
    """A tiny model and its data."""
    loader = torch.utils.data.DataLoader(training.rows("causal"), batch_size=4)
    return {"model": zoo.build("llama"), "loader": loader, "torch": torch}

"""Names that the example of Axolotl expects."""

from __future__ import annotations

from typing import Any

import training
import zoo


def names() -> dict[str, Any]:
    """A tiny model and its data."""
    return {"model": zoo.build("llama"), "dataset": training.rows("causal")}

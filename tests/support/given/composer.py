"""Names that the example of Composer expects; where Composer is not installed, its stand-in too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import training
import zoo


def names() -> dict[str, Any]:
    """A tiny model and its data."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import composer_stand_in
    from published import is_installed

    if not is_installed("composer"):
        composer_stand_in.install()
    loader = torch.utils.data.DataLoader(training.rows("causal"), batch_size=4)
    return {"model": zoo.build("llama"), "loader": loader, "torch": torch}

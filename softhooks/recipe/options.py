"""The options of `softhooks train` and their defaults. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Task = Literal["language-model", "classification"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

LEARNING_RATES = {
    "prompt_tuning": 3e-2,
    "prefix_tuning": 3e-2,
    "p_tuning": 1e-2,
    "p_tuning_v2": 3e-2,
    "multitask_prompt_tuning": 1e-2,
    "context_aware_prompt_tuning": 1e-3,
    "llama_adapter": 5e-3,
    "residual_prompt_tuning": 3e-2,
    "context_tuning": 3e-2,
    "cartridge": 2e-2,
}
"""The learning rate of each kind of method, for AdamW; `docs/methods.md` tells where they come from."""

_WITH_MLP = 5e-4  # a prefix that an MLP computes
_WITHOUT_NETWORK = 3e-2  # P-tuning with encoder="none"


@dataclass(frozen=True)
class TrainOptions:
    """The options of `softhooks train`; its help describes them.

    Attributes:
        validation: a share of the rows, or a file.
        learning_rate: None for the default of the method.
    """

    data: Path
    model: str
    output: Path
    task: Task = "language-model"
    validation: float | Path = 0.1
    text: str | None = None
    label: str | None = None
    epochs: float = 5.0
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    max_length: int = 512
    seed: int = 0
    precision: Precision = "auto"
    resume: bool = False

    @property
    def checkpoints(self) -> Path:
        """The directory with the Trainer's checkpoints."""
        return self.output / "checkpoints"

    @property
    def initial(self) -> Path:
        """The directory with the prompt as it was before training."""
        return self.output / "initial"


def learning_rate_of(options: TrainOptions, method: Any) -> float:
    """Return the given learning rate, or the default for a method with its options."""
    if options.learning_rate is not None:
        return options.learning_rate
    if method.kind in ("prefix_tuning", "p_tuning_v2") and method.projection:
        return _WITH_MLP
    if method.kind == "p_tuning" and method.encoder == "none":
        return _WITHOUT_NETWORK
    return LEARNING_RATES.get(method.kind, LEARNING_RATES["prompt_tuning"])

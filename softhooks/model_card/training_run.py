"""The facts about a training run that a model card describes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "bf16", "fp16",
    "neftune_noise_alpha",
)  # fmt: skip
_NOT_METRICS = ("_runtime", "_per_second", "_compilation_time", "_model_preparation_time")
LOSS = "loss"


@dataclass
class TrainingRun:
    """The facts about a training run.

    Attributes:
        settings: the hyperparameters by name.
        dataset: the name of the dataset; empty if it has none.
        rows: the number of training rows, or None if it is unknown.
        columns: the columns of the training rows that the model received; empty if they are unknown.
        logs: the Trainer's logs. The Trainer appends to this list.
    """

    settings: dict[str, object]
    dataset: str
    rows: int | None
    columns: tuple[str, ...]
    logs: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, args: Any, logs: Sequence[Mapping[str, Any]], dataset: Any) -> TrainingRun:
        """Collect the facts from a Trainer's arguments, logs and dataset."""
        settings = {name: _plain(getattr(args, name, None)) for name in _SETTINGS}
        steps = int(getattr(args, "max_steps", -1))
        length = {"max_steps": steps} if steps > 0 else {"num_train_epochs": getattr(args, "num_train_epochs", None)}
        used = {name: value for name, value in (settings | length).items() if value not in (None, False, 0)}
        return cls(
            used, _name_of(dataset), len(dataset) if hasattr(dataset, "__len__") else None, _columns(dataset), logs
        )

    def metrics(self) -> dict[str, tuple[float, int]]:
        """Return the last value of each evaluation metric, and its step."""
        return {name: points[-1][::-1] for name, points in self.curves().items() if name != LOSS}

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return the training loss and the evaluation metrics as lists of `(step, value)`, by name."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.logs:
            for name, value in _metrics_of(entry):
                found.setdefault(name, {})[int(entry.get("step", 0))] = value
        return {name: sorted(points.items()) for name, points in found.items()}


def _metrics_of(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        is_metric = name == LOSS or (name.startswith("eval_") and not name.endswith(_NOT_METRICS))
        if is_metric and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enum


def _name_of(dataset: Any) -> str:
    """Return the name, the configuration and the split of a dataset of `datasets`."""
    info = getattr(dataset, "info", None)
    parts = (getattr(info, "dataset_name", None), getattr(info, "config_name", None), getattr(dataset, "split", None))
    return ", ".join(str(part) for part in parts if part) if parts[0] else ""


def _columns(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "column_names", None)
    if names is None and isinstance(dataset, (list, tuple)) and dataset and isinstance(dataset[0], Mapping):
        names = list(dataset[0])  # rows of other datasets may be computed, so reading one could change the run
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()

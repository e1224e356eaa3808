"""A batch of a Trainer's training rows, for models that need more than token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from softhooks.method import Method
from softhooks.trainer.prompt_checks import TrainingCallback
from softhooks.trainer.trainer_patches import trainer_of


def training_batch(callback: TrainingCallback, method: Method) -> Mapping[str, Any] | None:
    """Return a batch of a Trainer's first training row, as its data collator makes it.

    The Trainer's data loader is not used, and random states are restored, so that training draws the same rows as without this
    batch.

    Args:
        callback: a callback that the Trainer is calling.
        method: the prompt's method, whose columns the batch keeps.

    Returns:
        the batch, or None if there is no Trainer, no training rows, or only an iterator that would lose its first row.
    """
    trainer: Any = trainer_of(callback)
    dataset: Any = None if trainer is None else trainer.train_dataset
    if trainer is None or dataset is None or isinstance(dataset, (Iterator, Mapping)):
        return None
    columns = trainer._signature_columns
    with _random_states_restored():
        try:
            row = _first_row(dataset)
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns = [*trainer._signature_columns, *method.batch_columns]
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
            batch = None if row is None else collate([row])
        finally:
            trainer._signature_columns = columns  # read again later: the forward will accept the prompt's columns
    return batch if isinstance(batch, Mapping) else None


def _first_row(dataset: Any) -> Any:
    """Return the first row of a dataset, or None if it is empty."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return next(iter(dataset), None)
    return dataset[0] if len(dataset) else None


@contextmanager
def _random_states_restored() -> Iterator[None]:
    """Run the `with` block, then restore the random states of torch, NumPy and Python, which data collators use."""
    states = random.getstate(), np.random.get_state()  # the global state
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

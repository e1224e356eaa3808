"""Replacement of the sampler of a Trainer's data loader by the method's sampler."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, RandomSampler

from softhooks.errors import TrainerError
from softhooks.method import Method


def use_sampler(loader: Any, method: Method, seed: int) -> Any:
    """Let a method order the rows of a Trainer's loader, instead of the Trainer's random sampler.

    Returns:
        the method's sampler, or None if it has none.

    Raises:
        TrainerError: the loader has no RandomSampler to replace.
    """
    if not method.has_sampler:
        return None
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    present = getattr(batches, "sampler", None)
    if not isinstance(batches, BatchSampler) or not isinstance(present, (RandomSampler, method.sampler_class)):
        raise TrainerError(
            f"the loader draws its rows by {type(present).__name__}; the method's sampler can only replace a RandomSampler.",
            "Leave the order to the Trainer (`sampling=None`), or train in random order on a dataset with a length.",
            method=method.kind,
            rows=type(getattr(loader, "dataset", loader)).__name__,
            order=type(present).__name__,
        )
    if not isinstance(present, method.sampler_class):
        batches.sampler = method.sampler(loader.dataset, batches.batch_size, seed)
    return batches.sampler

"""Make a Trainer use the method's sampler, and pad and keep the columns of rows that a template renders.

The Trainer's default collators do not pad all of these columns, and the Trainer removes those that `Layout.collator` needs. A
custom collator is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler
from transformers import DataCollatorWithPadding, default_data_collator

from softhooks.errors import TrainerError
from softhooks.layout.collate import Collator, padded_labels
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.method import Method
from softhooks.patching.patches import Patches
from softhooks.runtime.prompted_model import prompted_model_of

if TYPE_CHECKING:
    from transformers import Trainer

_FILL = {"labels": IGNORE_INDEX, "attention_mask": 0, "token_type_ids": 0}


def use_sampler(loader: Any, method: Method, seed: int) -> Any:
    """Replace a data loader's random sampler with the method's sampler.

    Return the method's sampler, or None if the method has none.
    """
    if not method.has_sampler:
        return None
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    present = getattr(batches, "sampler", None)
    if not isinstance(batches, BatchSampler) or not isinstance(present, (RandomSampler, method.sampler_class)):
        raise TrainerError(
            f"the data loader uses a {type(present).__name__}; the method's sampler can only replace a RandomSampler.",
            "Set `sampling=None` to use the Trainer's sampler, or train in random order on a dataset with a length.",
            method=method.kind,
            rows=type(getattr(loader, "dataset", loader)).__name__,
            order=type(present).__name__,
        )
    if not isinstance(present, method.sampler_class):
        batches.sampler = method.sampler(loader.dataset, batches.batch_size, seed)
    return batches.sampler


def prepare_template_rows(trainer: Trainer, method: Method) -> None:
    """Make a Trainer pad and keep the columns of rendered rows, whether the dataset or the collator renders the template."""
    if not method.token_layout.batch_columns and not method.renders_rows:
        return
    collator = trainer.data_collator
    by_default = collator is default_data_collator or (
        type(collator) is DataCollatorWithPadding and collator.tokenizer is trainer.processing_class
    )
    if by_default:
        pad = getattr(getattr(trainer.model, "config", None), "pad_token_id", None)
        trainer.data_collator = PaddedRows(collator, pad if isinstance(pad, int) and pad >= 0 else 0)
    if not isinstance(trainer.__dict__.get("_set_signature_columns_if_needed"), KeptColumns):
        KeptColumns(trainer)


class PaddedRows:
    """A Trainer's default collator, extended to pad every column.

    Args:
        default: `default_data_collator` or a `DataCollatorWithPadding`.
        pad_token_id: the padding id for `default_data_collator`, which has no tokenizer.
    """

    def __init__(self, default: Any, pad_token_id: int) -> None:
        self.default = default
        self.pad_token_id = pad_token_id
        if isinstance(default, DataCollatorWithPadding):
            self.tokenizer = default.tokenizer  # the Trainer saves the collator's tokenizer

    def __call__(self, features: Sequence[Any]) -> Any:
        """Pad columns whose entries differ in length, and call the default collator."""
        rows = [dict(row) if isinstance(row, Mapping) else dict(vars(row)) for row in features]
        ragged = {name for name in rows[0] if len({_length(row.get(name)) for row in rows}) > 1}
        by_tokenizer = isinstance(self.default, DataCollatorWithPadding)
        if by_tokenizer and (ragged or "labels" in rows[0]):
            return self._by_tokenizer(rows)
        if not ragged:
            return self.default(features)
        for name in ragged:
            fill = self.pad_token_id if name == "input_ids" else _FILL.get(name, 0)
            longest = max(_length(row[name]) for row in rows)
            for row in rows:
                values = [value.item() if isinstance(value, Tensor) else value for value in row[name]]
                row[name] = values + [fill] * (longest - len(values))
        return self.default(rows)

    def _by_tokenizer(self, rows: list[dict[str, Any]]) -> Any:
        """Pad rows with the tokenizer, and pad the labels on the same side, because the tokenizer does not pad labels."""
        labels = [row.pop("labels") for row in rows if "labels" in row]
        if labels:
            for row in rows:
                row.pop("label", None)  # the class index; `labels` already contains the word for the class
        batch = self.default(rows)
        if labels:
            batch["labels"] = padded_labels(labels, batch["attention_mask"])
        return batch


def _length(value: Any) -> int:
    """Return the length of a row's entry; -1 for scalars, and for strings, which collators do not convert to tensors."""
    if isinstance(value, str) or not hasattr(value, "__len__") or (isinstance(value, Tensor) and not value.dim()):
        return -1
    return len(value)


class KeptColumns:
    """Replaces a Trainer's `_set_signature_columns_if_needed` to keep the columns that templates and prompts need."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._set_signature_columns = trainer._set_signature_columns_if_needed
        Patches().set(trainer, "_set_signature_columns_if_needed", self)

    def __call__(self) -> None:
        """Add the columns that the collator and prompts need, including those of prompts attached later."""
        self._set_signature_columns()
        trainer, prompted = self._trainer, prompted_model_of(self._trainer.model)
        collator = trainer.data_collator
        more = [
            *(prompted.columns if prompted else ()),
            *(collator.columns if isinstance(collator, Collator) else ()),
        ]
        if trainer._signature_columns is not None:
            trainer._signature_columns += [
                name for name in dict.fromkeys(more) if name not in trainer._signature_columns
            ]

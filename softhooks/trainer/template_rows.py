"""Batches of a Trainer for a layout with a template: padding of rows, and columns that a collator renders.

The Trainer's default collators do not pad all columns of a template's rows, and the Trainer removes the columns that
`Layout.collator` renders. If the callback's method has a template, both are changed on the Trainer instance. A collator that the
script passed is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DataCollatorWithPadding, default_data_collator

from softhooks.layout.collate import Collator, padded_labels
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.patching.patches import Patches
from softhooks.runtime.prompted_model import prompted_model_of

if TYPE_CHECKING:
    from transformers import Trainer

    from softhooks.method import Method

_FILL = {"labels": IGNORE_INDEX, "attention_mask": 0, "token_type_ids": 0}


class PaddedRows:
    """A Trainer's default collator, extended to pad every column of the rows.

    Args:
        default: the Trainer's collator: `default_data_collator` or a `DataCollatorWithPadding`.
        pad_token_id: the padding id if the collator has no tokenizer.
    """

    def __init__(self, default: Any, pad_token_id: int) -> None:
        self.default = default
        self.pad_token_id = pad_token_id
        if isinstance(default, DataCollatorWithPadding):
            self.tokenizer = default.tokenizer  # the Trainer saves the collator's tokenizer

    def __call__(self, features: Sequence[Any]) -> Any:
        """Pad the columns with rows of different lengths, and let the default collator build the batch."""
        rows = [dict(row) if isinstance(row, Mapping) else dict(vars(row)) for row in features]
        ragged = {name for name in rows[0] if len({_length(row.get(name)) for row in rows}) > 1}
        if not ragged:
            return self.default(features)
        if isinstance(self.default, DataCollatorWithPadding):
            return self._by_tokenizer(rows)
        for name in ragged:
            fill = self.pad_token_id if name == "input_ids" else _FILL.get(name, 0)
            longest = max(_length(row[name]) for row in rows)
            for row in rows:
                row[name] = [*map(_plain, row[name]), *[fill] * (longest - _length(row[name]))]
        return self.default(rows)

    def _by_tokenizer(self, rows: list[dict[str, Any]]) -> Any:
        """Pad rows with the tokenizer; also pad labels, which the tokenizer leaves alone, on the same side."""
        labels = [row.pop("labels") for row in rows if "labels" in row]
        if labels:
            for row in rows:
                row.pop("label", None)  # the index of the class, whose word is in the labels
        batch = self.default(rows)
        if labels:
            batch["labels"] = padded_labels(labels, batch["attention_mask"])
        return batch


def _length(value: Any) -> int:
    """Return the length of a row's entry, or -1 for a scalar and for text, which collators do not convert to a tensor."""
    if isinstance(value, str) or not hasattr(value, "__len__") or (isinstance(value, Tensor) and not value.dim()):
        return -1
    return len(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


class KeptColumns:
    """Replaces `_set_signature_columns_if_needed` of a Trainer, so that the Trainer keeps the columns of templates and prompts.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._set_signature_columns = trainer._set_signature_columns_if_needed
        Patches().set(trainer, "_set_signature_columns_if_needed", self)

    def __call__(self) -> None:
        """Add the columns for the collator and for the prompts, which may have been attached after the Trainer made its list."""
        self._set_signature_columns()
        trainer, prompted = self._trainer, prompted_model_of(self._trainer.model)
        more = [*(prompted.columns if prompted else ()), *_columns_of(trainer.data_collator)]
        if trainer._signature_columns is not None:
            trainer._signature_columns += [
                name for name in dict.fromkeys(more) if name not in trainer._signature_columns
            ]


def _columns_of(collator: Any) -> tuple[str, ...]:
    return collator.columns if isinstance(collator, Collator) else ()


def prepare_template_rows(trainer: Trainer, method: Method) -> None:
    """Let a Trainer build batches from a template's rows, whether the dataset or the collator renders them."""
    if not method.token_layout.batch_columns:
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

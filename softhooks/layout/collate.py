"""The mapper and the data collator of a template: they convert rows of a dataset to ids, slots and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softhooks.errors import OptionError
from softhooks.layout.rendering import Row, render_row
from softhooks.layout.template import COLUMN, Template
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.layout.verbalizer import Verbalizer

_LABELS = ("labels", "label", "label_ids")


@dataclass
class Mapper:
    """A function for `Dataset.map`; see `Layout.mapper`."""

    template: Template
    tokenizer: Any
    max_length: int | None
    target: str | None
    verbalizer: Verbalizer | None
    label: str
    chat: dict[str, Any]

    def __post_init__(self) -> None:
        fields = self.template.fields
        masks = sum(part.kind == "mask" for part in self.template.parts)
        if self.target is not None and self.verbalizer is not None:
            raise OptionError("target and verbalizer are both given; pass only one of them.")
        if self.target is not None and fields.count(self.target) != 1:
            raise OptionError(
                f"target is {self.target!r}; it must occur exactly once among the template's fields, which are {fields}."
            )
        if self.verbalizer is not None and masks != 1:
            raise OptionError(
                f"the template has {masks} masks; a verbalizer needs exactly one {{mask}}.",
                "Write {mask} where the word of the class belongs.",
            )
        if self._is_causal and [part.kind for part in self.template.parts if part.kind != "text"][-1] != "mask":
            raise OptionError(
                "the template has slots or fields after {mask}; a causal language model cannot use them to predict the word.",
                "Write {mask} after all fields and slots.",
            )

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Render one row, or a batch of rows given as columns."""
        columns = [example[name] for name in self.template.fields if name in example]
        if not any(isinstance(column, list) for column in columns):
            return self.render(example)
        count = len(columns[0])
        rows = [self.render({name: column[i] for name, column in example.items()}) for i in range(count)]
        return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}

    def render(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Render one row."""
        is_unlabeled = self._is_causal and fields.get(self.label) is None
        row = render_row(self.template, self.tokenizer, fields, self.max_length, self._word(fields), **self.chat)
        if is_unlabeled:
            row.ids = row.ids[: row.masks[0]]  # the text from which the model predicts the word
        found: dict[str, Any] = {"input_ids": row.ids, "attention_mask": [1] * len(row.ids)}
        if "token_type_ids" in self.tokenizer.model_input_names:
            found["token_type_ids"] = [0] * len(row.ids)
        found[COLUMN] = row.slots
        labels = None if is_unlabeled else self._labels(row, fields)
        return found if labels is None else found | {"labels": labels}

    @property
    def _is_causal(self) -> bool:
        return self.verbalizer is not None and self.verbalizer.causal

    def _word(self, fields: Mapping[str, Any]) -> int | None:
        """Return the id that replaces `{mask}`, or None for the tokenizer's mask token."""
        if self.verbalizer is None or not self.verbalizer.causal:
            return None
        # A row without a class is cut at this place; its word only counts toward `max_length`.
        label = fields.get(self.label)
        return self.verbalizer.ids[0] if label is None else self.verbalizer.token(label)

    def labeled(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add the verbalizer's labels to a rendered row that has a class but no labels."""
        found = dict(row)
        if self.verbalizer is None or "labels" in row or self.label not in row:
            return found
        ids = [int(token) for token in row["input_ids"]]
        places = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(places) != 1:
            raise OptionError(
                f"a rendered row contains {len(places)} masks; a verbalizer needs exactly one.",
                "Pass the verbalizer to the mapper that renders the rows, not to the collator.",
            )
        labels = [IGNORE_INDEX] * len(ids)
        labels[places[0]] = self.verbalizer.token(int(row[self.label]))
        return found | {"labels": labels}

    def _labels(self, row: Row, fields: Mapping[str, Any]) -> list[int] | None:
        labels = [IGNORE_INDEX] * len(row.ids)
        if self.target is not None:
            ((start, end),) = row.spans[self.target]
            labels[start:end] = row.ids[start:end]
        elif self.verbalizer is not None:
            if self.label not in fields:
                raise OptionError(f"the data has the columns {list(fields)}; the verbalizer needs {self.label!r}.")
            labels[row.masks[0]] = self.verbalizer.token(fields[self.label])
        else:
            return None
        return labels


@dataclass
class Collator:
    """A data collator, which also renders the rows that `Mapper` has not rendered yet."""

    mapper: Mapper

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset columns that the collator can use."""
        rendered = [*self.mapper.tokenizer.model_input_names, COLUMN, *_LABELS]
        return tuple(dict.fromkeys([*rendered, *self.mapper.template.fields, self.mapper.label]))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch with `input_ids`, `attention_mask`, `soft_slots` and, if the rows have labels or classes, `labels`."""
        rows = [self._rendered(row) for row in examples]
        labels = [row["labels"] for row in rows if "labels" in row]
        if 0 < len(labels) < len(rows):
            raise OptionError(
                "some rows of the batch have a label and others have none.",
                "Put rows with and without a label in different batches.",
                without_label=", ".join(str(place) for place, row in enumerate(rows) if "labels" not in row),
            )
        names = [*self.mapper.tokenizer.model_input_names, COLUMN]
        held = [{name: row[name] for name in names if name in row} for row in rows]
        batch: dict[str, Tensor] = dict(self.mapper.tokenizer.pad(held, return_tensors="pt"))
        if labels:
            batch["labels"] = padded_labels(labels, batch["attention_mask"])
        return batch

    def _rendered(self, example: Mapping[str, Any]) -> dict[str, Any]:
        if "input_ids" in example:
            row = self.mapper.labeled(example)
        else:
            self._require_fields(example)
            row = self.mapper.render(example)
        for name in _LABELS:
            if "labels" not in row and not isinstance(example.get(name), str | None):
                row["labels"] = example[name]
        return row

    def _require_fields(self, example: Mapping[str, Any]) -> None:
        fields = self.mapper.template.fields
        if fields and not any(name in example for name in fields):
            raise OptionError(
                "the rows have neither `input_ids` nor any of the template's fields.",
                "A Trainer removes columns that are not arguments of the model's forward. Train with `SoftPromptCallback`, which "
                "keeps the fields, or set `TrainingArguments(remove_unused_columns=False)`.",
                fields=", ".join(fields),
                given=", ".join(map(str, example)) or "nothing",
            )


def padded_labels(labels: Sequence[Any], mask: Tensor) -> Tensor:
    """Stack one label per row, [B], or pad token labels with -100 to the shape of the mask, [B, T]."""
    rows = [torch.as_tensor(row) for row in labels]
    if not rows[0].dim():
        return torch.stack(rows)
    # Padding is found by the mask, because the id of the padding token may also occur in a text.
    padded = torch.full(mask.shape, IGNORE_INDEX)
    for i, row in enumerate(rows):
        padded[i, mask[i].bool()] = row
    return padded

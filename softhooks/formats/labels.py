"""The label names of a classification head: `id2label`, `label2id` and `problem_type` of a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softhooks.errors import CheckpointError

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""The values that transformers allows for `config.problem_type`."""

Heads = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Labels:
    """The label names of a head, in the same form as in a model's config."""

    id2label: dict[int, str] | None
    label2id: dict[str, int] | None
    problem_type: str | None

    @classmethod
    def of(cls, config: Any) -> Labels:
        """Read the label names from a config."""
        id2label, label2id = getattr(config, "id2label", None), getattr(config, "label2id", None)
        return cls(
            dict(id2label) if isinstance(id2label, Mapping) else id2label,
            dict(label2id) if isinstance(label2id, Mapping) else label2id,
            getattr(config, "problem_type", None),
        )

    def put(self, config: Any) -> None:
        """Write the label names into a config, unless it has no `id2label`."""
        if hasattr(config, "id2label") and Labels.of(config) != self:
            config.id2label = None if self.id2label is None else dict(self.id2label)
            config.label2id = None if self.label2id is None else dict(self.label2id)
            config.problem_type = self.problem_type

    def described(self, heads: Heads) -> dict[str, Any] | None:
        """Return the label names as JSON values, or None if they are malformed or match no head."""
        try:
            names = {int(number): name for number, name in (self.id2label or {}).items()}
        except (TypeError, ValueError):
            return None
        value = {
            "id2label": {str(number): names[number] for number in sorted(names)},
            "label2id": {name: number for name, number in (self.label2id or {}).items() if _is_number(number, names)},
            "num_labels": len(names),
            "problem_type": self.problem_type if self.problem_type in PROBLEM_TYPES else None,
        }
        return value if _are_sound(value, heads) else None


def read_labels(value: Any, heads: Heads, source: str) -> Labels | None:
    """Read the label names of a saved prompt, if there are any, and check that they match a head."""
    if value is None:
        return None
    if not isinstance(value, dict) or not _are_sound(value, heads):
        raise CheckpointError(
            f"the label names in {source} are malformed, or no head has as many outputs as there are labels.",
            "Save the prompt again.",
            labels=value,
            rows=sorted(_row_counts(heads)) or "no head",
        )
    names = {int(number): name for number, name in value["id2label"].items()}
    return Labels(names, dict(value["label2id"]), value.get("problem_type"))


def _are_sound(value: dict[str, Any], heads: Heads) -> bool:
    """Return whether the label names are well-formed and a head has one output for each label."""
    names, numbers, count = value.get("id2label"), value.get("label2id"), value.get("num_labels")
    problem_type = value.get("problem_type")
    return (
        isinstance(names, dict)
        and isinstance(numbers, dict)
        and count == len(names)
        and count in _row_counts(heads)
        and [str(number) for number in range(len(names))] == sorted(names, key=lambda key: (len(key), key))
        and all(isinstance(name, str) for name in (*names.values(), *numbers))
        and all(_is_number(number, range(len(names))) for number in numbers.values())
        and problem_type in (None, *PROBLEM_TYPES)
        and not (problem_type == PROBLEM_TYPES[1] and count == 1)  # transformers refuses such a config
    )


def _row_counts(heads: Heads) -> set[int]:
    """Return the sizes of the first dimension of the heads' tensors; one of them must equal the number of labels."""
    return {tensor.shape[0] for head in heads.values() for tensor in head.values() if tensor.dim()}


def _is_number(value: Any, known: Any) -> bool:
    return type(value) is int and value in known

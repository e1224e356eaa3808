"""The names of a head's labels: `id2label`, `label2id` and `problem_type` of a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softhooks.errors import CheckpointError

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""What transformers knows as `config.problem_type`."""


@dataclass(frozen=True)
class Labels:
    """The names of a head's labels, as a config holds them."""

    id2label: dict[int, str] | None
    label2id: dict[str, int] | None
    problem_type: str | None

    @classmethod
    def of(cls, config: Any) -> Labels:
        """Read the label names from a config."""
        named, numbered = getattr(config, "id2label", None), getattr(config, "label2id", None)
        return cls(
            dict(named) if isinstance(named, Mapping) else named,
            dict(numbered) if isinstance(numbered, Mapping) else numbered,
            getattr(config, "problem_type", None),
        )

    def put(self, config: Any) -> None:
        """Let a config hold them."""
        if hasattr(config, "id2label") and Labels.of(config) != self:
            config.id2label = None if self.id2label is None else dict(self.id2label)
            config.label2id = None if self.label2id is None else dict(self.label2id)
            config.problem_type = self.problem_type

    def described(self, heads: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any] | None:
        """As JSON holds them; None where a config holds something else than a name for each of a head's rows."""
        try:
            named = {int(number): name for number, name in (self.id2label or {}).items()}
        except (TypeError, ValueError):
            return None
        numbered = {name: number for name, number in (self.label2id or {}).items() if _is_number(number, named)}
        is_sound = len(named) in _row_counts(heads) and sorted(named) == list(range(len(named)))
        if not is_sound or not all(map(_is_name, (*named.values(), *numbered))):
            return None
        return {
            "id2label": {str(number): named[number] for number in sorted(named)},
            "label2id": numbered,
            "num_labels": len(named),
            "problem_type": self.problem_type if self.problem_type in PROBLEM_TYPES else None,
        }


def read_labels(told: Any, heads: Mapping[str, Mapping[str, Tensor]], source: str) -> Labels | None:
    """Read the names that a file gives, and check them against its heads; None where it gives none.

    Raises:
        CheckpointError: they are no names, or not as many as a head has rows.
    """
    if told is None:
        return None
    named, numbered, problem, count = (
        told.get(key) if isinstance(told, dict) else None
        for key in ("id2label", "label2id", "problem_type", "num_labels")
    )
    rows = _row_counts(heads)
    is_sound = (
        isinstance(named, dict)
        and isinstance(numbered, dict)
        and count == len(named)
        and count in rows
        and [str(number) for number in range(len(named))] == sorted(named, key=lambda key: (len(key), key))
        and all(map(_is_name, (*named.values(), *numbered)))
        and all(_is_number(number, range(len(named))) for number in numbered.values())
        and problem in (None, *PROBLEM_TYPES)
        and not (problem == PROBLEM_TYPES[1] and count == 1)  # transformers takes no such config
    )
    if not is_sound:
        raise CheckpointError(
            "the labels of a prompt's head must be named by number, as many as the head has rows.",
            "Save the prompt again.",
            file=source,
            labels=told,
            rows=sorted(rows) or "no head",
        )
    assert isinstance(named, dict)
    assert isinstance(numbered, dict)
    return Labels({int(number): name for number, name in named.items()}, dict(numbered), problem)


def _row_counts(heads: Mapping[str, Mapping[str, Tensor]]) -> set[int]:
    """How many rows the tensors of some heads have; the last one has as many as there are labels."""
    return {tensor.shape[0] for head in heads.values() for tensor in head.values() if tensor.dim()}


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any, known: Any) -> bool:
    return type(value) is int and value in known

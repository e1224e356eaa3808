"""The names of a head's labels: `config.id2label` and what belongs to it, as the prompt that is on was trained with.

They belong to a model's config, from which `pipeline` takes them. A prompt with a head of its own brings its own names; the
config shows them while the prompt is on, and the model's again when it is off or removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softhooks.compat.peft import unwrapped
from softhooks.errors import CheckpointError

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt
    from softhooks.runtime.prompted_model import PromptedModel

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
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
        is_sound = len(named) in rows_of(heads) and sorted(named) == list(range(len(named)))
        if not is_sound or not all(map(_is_name, (*named.values(), *numbered))):
            return None
        return {
            "id2label": {str(number): named[number] for number in sorted(named)},
            "label2id": numbered,
            "num_labels": len(named),
            "problem_type": self.problem_type if self.problem_type in PROBLEMS else None,
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
    rows = rows_of(heads)
    is_sound = (
        isinstance(named, dict)
        and isinstance(numbered, dict)
        and count == len(named)
        and count in rows
        and [str(number) for number in range(len(named))] == sorted(named, key=lambda key: (len(key), key))
        and all(map(_is_name, (*named.values(), *numbered)))
        and all(_is_number(number, range(len(named))) for number in numbered.values())
        and problem in (None, *PROBLEMS)
        and not (problem == PROBLEMS[1] and count == 1)  # transformers takes no such config
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


def rows_of(heads: Mapping[str, Mapping[str, Tensor]]) -> set[int]:
    """How many rows the tensors of some heads have; the last one has as many as there are labels."""
    return {tensor.shape[0] for head in heads.values() for tensor in head.values() if tensor.dim()}


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any, known: Any) -> bool:
    return type(value) is int and value in known


class LabelNames:
    """Which prompt's label names a model's config shows.

    Args:
        prompted: the state of the model's prompts.
    """

    def __init__(self, prompted: PromptedModel) -> None:
        self._prompted = prompted
        self._model: Labels | None = None  # the model's own, while a prompt's are shown
        self._shown: str | None = None
        self._brought: set[str] = set()  # the prompts whose names were not the model's when they were attached

    @property
    def _config(self) -> Any:
        return getattr(unwrapped(self._prompted.model), "config", None)

    def of(self, prompt: AttachedPrompt) -> Labels | None:
        """The names of a prompt's head as they are now; None where it has no head."""
        if not len(prompt.heads):
            return None
        return Labels.of(self._config) if prompt.name == self._shown or prompt.labels is None else prompt.labels

    def begin(self, prompt: AttachedPrompt) -> None:
        """Give a new prompt the names that the config has at this moment, unless it brought its own."""
        if not len(prompt.heads):
            return
        if prompt.labels is not None:
            self._brought.add(prompt.name)
            return
        self._brought.discard(prompt.name)
        before, now = self._prompted.prompts.get(self._shown or ""), Labels.of(self._config)
        if before is not None and before.labels == now:
            now = self._model or now  # a new head is a copy of the model's, and is named like it
        elif before is not None:
            self._shown = None  # what was changed since belongs to the new prompt, not to the one before
        prompt.labels = now

    def show(self) -> None:
        """Let the config show the names of the prompt that is on; those of the model where none with a head is."""
        prompted = self._prompted
        prompt = None if prompted.disabled or prompted.active is None else prompted.prompts.get(prompted.active)
        name = prompt.name if prompt is not None and len(prompt.heads) else None
        if name == self._shown:
            return
        config = self._config
        if config is None:
            return
        now, before = Labels.of(config), prompted.prompts.get(self._shown or "")
        if before is not None:
            before.labels = now
        if self._model is None:
            self._model = now
        elif before is None and self._shown not in (None, *self._brought):
            self._model = now  # its prompt is gone, and was attached to a model that had these names
        self._shown = name
        ((prompt.labels if prompt is not None and name is not None else None) or self._model).put(config)
        if name is None and not prompted.prompts:
            self._model = None

    @contextmanager
    def model_shown(self) -> Iterator[None]:
        """Let the config show the model's own names for a while."""
        config, now = self._config, Labels.of(self._config)
        if self._shown in self._brought and self._model is not None:
            self._model.put(config)
        try:
            yield
        finally:
            if self._shown in self._brought:
                now.put(config)

"""The training settings of a run. Names and defaults are those of PEFT's method comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

DEFAULTS = Path(__file__).with_name("default_training.json")
_ONLY = {"compile": False, "use_gc": False, "use_amp": False, "autocast_adapter_dtype": True}
"""Settings of PEFT's comparison that have one value in all of its experiments with prompts, and here."""


class ExperimentError(ValueError):
    """An experiment, or an option of the command, is wrong."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        model_id: a repository on the Hub or a directory.
        dtype: the dtype of the base model; trained parameters are in fp32.
        max_seq_length: longer training texts and questions are truncated to this number of tokens.
        batch_size, batch_size_eval: the rows of a training batch, and of a batch in evaluation.
        max_steps: the number of optimizer steps.
        eval_steps: the number of steps between evaluations on the validation rows.
        query_template: the text before the answer.
        grad_norm_clip: the largest norm of the gradient; 0 does not clip.
        optimizer_type: a class in `torch.optim`.
        lr_scheduler: `cosine`, with warmup in the first tenth of the steps, or None for a constant learning rate.
        generation_kwargs: options of `GenerationConfig`; of `max_length` and `max_new_tokens`, the stricter one applies.
        attn_implementation: as in `from_pretrained`.
        init_kv_cache_prefix: a text whose keys and values initialize a prefix.
        compile, use_gc, use_amp, autocast_adapter_dtype: part of the format of PEFT's results; other values are refused.
    """

    model_id: str
    dtype: str
    max_seq_length: int
    batch_size: int
    batch_size_eval: int
    max_steps: int
    eval_steps: int
    compile: bool
    use_gc: bool
    query_template: str
    seed: int
    grad_norm_clip: float
    optimizer_type: str
    optimizer_kwargs: dict[str, Any]
    lr_scheduler: str | None
    use_amp: bool
    autocast_adapter_dtype: bool
    generation_kwargs: dict[str, Any]
    attn_implementation: str | None
    init_kv_cache_prefix: str | None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise ExperimentError(f"{name} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}.")
        for name, only in _ONLY.items():
            if getattr(self, name) != only:
                raise ExperimentError(f"{name} is {getattr(self, name)}; this benchmark supports only {only}.")
        for name in ("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.eval_steps > self.max_steps:
            raise ExperimentError(f"eval_steps is {self.eval_steps}; it must be at most max_steps, {self.max_steps}.")
        if self.grad_norm_clip < 0:
            raise ExperimentError(f"grad_norm_clip is {self.grad_norm_clip}; it must be 0 or more.")
        _check_choice("dtype", self.dtype, ("float32", "float16", "bfloat16"))
        _check_choice("lr_scheduler", self.lr_scheduler, ("cosine", None))
        if "{query}" not in self.query_template:
            raise ExperimentError(f"query_template is {self.query_template!r}; it must contain {{query}}.")
        if "lr" not in self.optimizer_kwargs:
            raise ExperimentError(
                f"optimizer_kwargs is {self.optimizer_kwargs}; it must contain lr, the learning rate."
            )

    @classmethod
    def of(cls, *changes: Mapping[str, Any]) -> Settings:
        """Return the default settings with changes; later ones win, and a dictionary replaces the default as a whole."""
        values: dict[str, Any] = json.loads(DEFAULTS.read_text(encoding="utf-8"))
        for change in changes:
            check_names(change, values, "a training setting")
            values |= change
        return cls(**values)


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise an error if a name is not known."""
    names = sorted(known)
    if unknown := sorted(set(given) - set(names)):
        raise ExperimentError(f"{', '.join(unknown)} is not {what}; known are {', '.join(names)}.")


def parse_changes(given: Iterable[str]) -> dict[str, Any]:
    """Parse settings of the form `name=value`; a value that is not JSON is a string."""
    changes: dict[str, Any] = {}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator:
            raise ExperimentError(f"{item!r} is not a setting; write name=value, such as max_steps=100.")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    check_names(changes, (field.name for field in fields(Settings)), "a training setting")
    return changes


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (get_origin(hint) or hint)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ExperimentError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")

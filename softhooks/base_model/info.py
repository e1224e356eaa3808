"""Facts that identify the base model of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.cached_commits import cached_commits
from softhooks.base_model.fingerprint import Fingerprint
from softhooks.compat.peft import unwrapped
from softhooks.errors import CheckpointError

_JSON: dict[str, tuple[str, type]] = {
    "class_name": ("class", str),
    "name_or_path": ("name_or_path", str),
    "revision": ("revision", str),
    "quantization": ("quantization", str),
    "width": ("width", int),
    "vocabulary": ("vocabulary", int),
    "sliding_window": ("slides", bool),
    "task": ("task", str),
}
"""The attributes of `BaseModelInfo`, with their keys in a saved prompt and their types."""


@dataclass(frozen=True)
class BaseModelInfo:
    """The known facts about a base model; unknown facts are an empty string or None.

    Attributes:
        name_or_path: the name on the Hub, or the path.
        revision: the commit on the Hub.
        quantization: the quantization method and the number of bits.
        width: the hidden size of the embeddings, H.
        vocabulary: the number of rows of the embedding matrix; 0 if the model does not take token ids.
        sliding_window: whether the config sets a sliding window.
        task: the `task_type` in PEFT's config, which does not name the model class; None if PEFT did not save the prompt.
    """

    class_name: str = ""
    name_or_path: str = ""
    revision: str | None = None
    quantization: str | None = None
    fingerprint: Fingerprint | None = None
    width: int | None = None
    vocabulary: int | None = None
    sliding_window: bool | None = None
    task: str | None = None

    @classmethod
    def of(cls, model: nn.Module, structure: ModelStructure, fingerprint: Fingerprint | None = None) -> BaseModelInfo:
        """Read the facts from a model."""
        plain = unwrapped(model)
        config: Any = getattr(plain, "config", None)
        return cls(
            class_name=type(plain).__name__,
            name_or_path=str(getattr(config, "_name_or_path", "") or ""),
            revision=_revision(plain, config),
            quantization=_quantization(config),
            fingerprint=fingerprint,
            width=structure.entry.width,
            vocabulary=structure.vocabulary,
            sliding_window=bool(getattr(config, "sliding_window", None)),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any], source: str) -> BaseModelInfo:
        """Read the facts from a saved prompt; values of the wrong type, and impossible sizes, are ignored."""
        known = {name: value[key] for name, (key, kind) in _JSON.items() if type(value.get(key)) is kind}
        known = {name: fact for name, fact in known.items() if type(fact) is not int or 0 < fact < 2**31}
        try:
            fingerprint = None if value.get("fingerprint") is None else Fingerprint.from_json(value["fingerprint"])
        except ValueError as error:
            raise CheckpointError(f"{source} has a malformed fingerprint of its base model: {error}.") from error
        return cls(**known, fingerprint=fingerprint)

    def to_json(self) -> dict[str, Any]:
        """Return the known facts in the format of a saved prompt."""
        values = {key: getattr(self, name) for name, (key, _) in _JSON.items()}
        values["fingerprint"] = self.fingerprint and self.fingerprint.to_json()
        return {key: value for key, value in values.items() if value is not None}

    def __str__(self) -> str:
        known = self.fingerprint
        facts = [f"revision {self.revision}"] if self.revision else []
        facts += [f"digest {known.digest}, {known.vocabulary} rows of embeddings"] if known else []
        name = f"{self.class_name or 'a model'} {self.name_or_path or 'without a name'}"
        return name + (f" ({', '.join(facts)})" if facts else "")


def _revision(model: nn.Module, config: Any) -> str | None:
    """Return the commit that a model was loaded from, if transformers recorded it or its files are in the cache."""
    recorded = getattr(config, "_commit_hash", None)
    if recorded:
        return str(recorded)
    return next(iter(cached_commits(model, str(getattr(config, "_name_or_path", "") or ""))), None)


def _quantization(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else vars(settings)
    method = values.get("quant_method")
    words = [str(getattr(method, "value", method) or type(settings).__name__)]
    words += [name for name in ("load_in_4bit", "load_in_8bit") if values.get(name) or values.get(f"_{name}")]
    words += [f"{values['bits']} bits"] if values.get("bits") else []
    return " ".join(dict.fromkeys(words))


def class_of_transformers(name: str) -> type | None:
    """Return the public transformers class with this name, which may be any string; None if there is no such class."""
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    return found if isinstance(found, type) else None

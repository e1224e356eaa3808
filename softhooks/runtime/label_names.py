"""The names of a head's labels: `config.id2label` and what belongs to it, as the prompt that is on was trained with.

They belong to a model's config, from which `pipeline` takes them. A prompt with a head of its own brings its own names; the
config shows them while the prompt is on, and the model's again when it is off or removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from softhooks.compat.peft import unwrapped
from softhooks.formats.labels import Labels
from softhooks.runtime.attached_prompt import AttachedPrompt


class LabelNames:
    """Which prompt's label names a model's config shows.

    Args:
        model: the model.
        prompts: its prompts, by name; changes as prompts come and go.
    """

    def __init__(self, model: nn.Module, prompts: Mapping[str, AttachedPrompt]) -> None:
        self._holder = model
        self._prompts = prompts
        self._model: Labels | None = None  # the model's own, while a prompt's are shown
        self._shown: str | None = None
        self._brought: set[str] = set()  # the prompts whose names were not the model's when they were attached

    @property
    def _config(self) -> Any:
        return getattr(unwrapped(self._holder), "config", None)

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
        before, now = self._prompts.get(self._shown or ""), Labels.of(self._config)
        if before is not None and before.labels == now:
            now = self._model or now  # a new head is a copy of the model's, and is named like it
        elif before is not None:
            self._shown = None  # what was changed since belongs to the new prompt, not to the one before
        prompt.labels = now

    def show(self, active: str | None) -> None:
        """Show the label names of a prompt in the config; those of the model for None or a prompt without a head."""
        prompt = None if active is None else self._prompts.get(active)
        name = prompt.name if prompt is not None and len(prompt.heads) else None
        if name == self._shown:
            return
        config = self._config
        if config is None:
            return
        now, before = Labels.of(config), self._prompts.get(self._shown or "")
        if before is not None:
            before.labels = now
        if self._model is None:
            self._model = now
        elif before is None and self._shown not in (None, *self._brought):
            self._model = now  # its prompt is gone, and was attached to a model that had these names
        self._shown = name
        ((prompt.labels if prompt is not None and name is not None else None) or self._model).put(config)
        if name is None and not self._prompts:
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

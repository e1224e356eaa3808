"""The label names in a model's config (`config.id2label`, ...), from which `pipeline` reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from softhooks.compat.peft import unwrapped
from softhooks.formats.labels import Labels
from softhooks.runtime.attached_prompt import AttachedPrompt

_LOCK = threading.Lock()
"""Held while label names are written to a config; a lock of each model could not be copied with it."""


class LabelNames:
    """Shows the label names of the active prompt's head in a model's config, or the model's own names if there is no such head.

    Args:
        model: the model.
        prompts: the model's prompts, by name; the mapping changes as prompts are attached and removed.
    """

    def __init__(self, model: nn.Module, prompts: Mapping[str, AttachedPrompt]) -> None:
        self._holder = model
        self._prompts = prompts
        self._model: Labels | None = None  # the model's own names, while a prompt's names are shown
        self._shown: str | None = None  # the prompt whose names are shown
        self._stored: set[str] = set()  # the prompts that were saved with their own label names

    @property
    def _config(self) -> Any:
        return getattr(unwrapped(self._holder), "config", None)

    def of(self, prompt: AttachedPrompt) -> Labels | None:
        """Return the label names of a prompt's head, or None if it has no head."""
        if not len(prompt.heads):
            return None
        return Labels.of(self._config) if prompt.name == self._shown or prompt.labels is None else prompt.labels

    def add(self, prompt: AttachedPrompt) -> None:
        """Give a new prompt the label names in the config, unless it was saved with names of its own."""
        if not len(prompt.heads):
            return
        if prompt.labels is not None:
            self._stored.add(prompt.name)
            return
        self._stored.discard(prompt.name)
        before, now = self._prompts.get(self._shown or ""), Labels.of(self._config)
        if before is not None and before.labels == now:
            now = self._model or now  # the new head is a copy of the model's, so it has the model's names
        elif before is not None:
            self._shown = None  # the user has changed the names in the config, for the new prompt
        prompt.labels = now

    def show(self, active: str | None) -> None:
        """Write the active prompt's label names into the config, or the model's own if no active prompt has a head."""
        prompt = None if active is None else self._prompts.get(active)
        name = prompt.name if prompt is not None and len(prompt.heads) else None
        if name == self._shown:
            return
        with _LOCK:
            self._show(name, prompt)

    def _show(self, name: str | None, prompt: AttachedPrompt | None) -> None:
        config = self._config
        if config is None or name == self._shown:
            return
        now, before = Labels.of(config), self._prompts.get(self._shown or "")
        if before is not None:
            before.labels = now  # the user may have changed them in the config
        if self._model is None:
            self._model = now
        elif before is None and self._shown not in (None, *self._stored):
            self._model = now  # the removed prompt had the model's names
        self._shown = name
        ((prompt.labels if prompt is not None and name is not None else None) or self._model).put(config)
        if name is None and not self._prompts:
            self._model = None

    @contextmanager
    def model_shown(self) -> Iterator[None]:
        """Show the model's own label names inside the `with` block."""
        config, now = self._config, Labels.of(self._config)
        if self._shown in self._stored and self._model is not None:
            self._model.put(config)
        try:
            yield
        finally:
            if self._shown in self._stored:
                now.put(config)

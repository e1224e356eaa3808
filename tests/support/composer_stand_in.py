"""A stand-in for MosaicML Composer, which conflicts with these versions: its events in their order, and its checkpoints' states.

Nothing of Composer's is tested by it; it calls what is tested as published.json records it.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from published import FACTS
from torch import nn

Event: Any = enum.Enum("Event", [(name.upper(), name) for name in FACTS["composer"]["Event"]])


class Algorithm:
    """The base class."""


class HuggingFaceModel(nn.Module):
    """A model that holds a Hugging Face model as `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.model(**batch)


class Trainer:
    """Events and checkpoints in the documented order, in one process."""

    def __init__(
        self, model: Any, optimizers: Any, train_dataloader: Any, max_duration: str, algorithms: list[Any],
        save_folder: str, load_path: str | None = None, **state: Any,
    ) -> None:  # fmt: skip
        given = optimizers if isinstance(optimizers, list) else [optimizers]
        self.state = SimpleNamespace(
            model=model, optimizers=given, timestamp=SimpleNamespace(batch=0, epoch=0), **state
        )
        self.loader, self.algorithms = train_dataloader, algorithms
        self.epochs, self.folder = int(max_duration.removesuffix("ep")), Path(save_folder)
        self.tell("init")
        self.tell("before_load")
        if load_path is not None:
            held = torch.load(load_path, weights_only=True)
            model.load_state_dict(held["model"], strict=True)
            given[0].load_state_dict(held["optimizer"])
            self.state.timestamp.batch, self.state.timestamp.epoch = held["batch"], held["epoch"]
        self.tell("after_load")

    def tell(self, name: str) -> None:
        for algorithm in self.algorithms:
            if algorithm.match(Event(name), self.state):
                algorithm.apply(Event(name), self.state, None)

    def fit(self) -> None:
        state, optimizer = self.state, self.state.optimizers[0]
        self.tell("fit_start")
        while state.timestamp.epoch < self.epochs:
            for batch in self.loader:
                optimizer.zero_grad()
                state.model(batch).loss.backward()
                self.tell("after_train_batch")
                optimizer.step()
                state.timestamp.batch += 1
                self.tell("batch_end")
            state.timestamp.epoch += 1
            self.tell("epoch_end")
            self.tell("epoch_checkpoint")
            self.folder.mkdir(parents=True, exist_ok=True)
            held = {"model": state.model.state_dict(), "optimizer": optimizer.state_dict(), **vars(state.timestamp)}
            torch.save(held, self.folder / f"ep{state.timestamp.epoch}.pt")
        self.tell("fit_end")


def install(modules: dict[str, ModuleType] = sys.modules) -> None:
    """Make the stand-in importable."""
    for name, holds in {
        "composer": {"Trainer": Trainer},
        "composer.core": {"Algorithm": Algorithm, "Event": Event},
        "composer.models": {"HuggingFaceModel": HuggingFaceModel},
    }.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(holds)

"""What a contestant gets, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from benchmarks.quality.inputs import DecoderInputs, EncoderInputs, Rows
from benchmarks.quality.task import Row, Task

VIRTUAL_TOKENS = 20


@dataclass(frozen=True)
class Setup:
    """A frozen model's task, training rows and options.

    Attributes:
        inputs: tokenizes rows for the model.
        rows: the training rows.
        options: options of the run that replace the contestant's own.
        seed, learning_rate: of the run.
    """

    task: Task
    inputs: EncoderInputs | DecoderInputs
    rows: list[Row]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    learning_rate: float = 0.0

    def with_options(self, **options: Any) -> Setup:
        """Return a copy with these options added."""
        return replace(self, options={**self.options, **options})

    def without_options(self, *names: str) -> Setup:
        """Return a copy without these options."""
        return replace(self, options={name: value for name, value in self.options.items() if name not in names})

    @property
    def is_encoder(self) -> bool:
        """Whether the model classifies with a new head."""
        return isinstance(self.inputs, EncoderInputs)


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for a Trainer.

    Attributes:
        model: the model, wrapped or not.
        callbacks: for the Trainer.
        save: writes what was trained into a directory; None if that is the trained tensors as they are.
        dataset: training rows, if the contestant needs others than `inputs.dataset(rows)`.
        keep: whether the model runs on a cartridge's document only once (`softhooks.kept`).
    """

    model: Any
    callbacks: list[TrainerCallback] = field(default_factory=list)
    save: Callable[[Path], None] | None = None
    dataset: Rows | None = None
    keep: bool = False


@dataclass(frozen=True)
class Contestant:
    """A way to tune a model.

    Attributes:
        name: for runs and files.
        label: for tables.
        library: `softhooks`, `PEFT`, `transformers`, or `variant` for what is in `variants.py`.
        rates: the learning rates to choose from, for encoders and for decoders; None if the contestant cannot tune such a model.
        prepare: prepares a loaded model.
        twin: the contestant of softhooks that PEFT's method is compared with.
    """

    name: str
    label: str
    library: str
    encoder_rates: tuple[float, ...] | None
    decoder_rates: tuple[float, ...] | None
    prepare: Callable[[PreTrainedModel, Setup], Prepared]
    twin: str | None = None

    def rates(self, is_encoder: bool) -> tuple[float, ...] | None:
        """Return the learning rates for a kind of model."""
        return self.encoder_rates if is_encoder else self.decoder_rates

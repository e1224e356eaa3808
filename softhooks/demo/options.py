"""Options of `softhooks demo`; this module does not import torch, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LanguageModelOptions:
    """The options of the demo on a language model; `softhooks demo --help` describes them.

    The learning rates were chosen on part of the training rows, not on the test rows.
    """

    output: Path = Path("softhooks-demo")
    model: str | None = None
    seed: int = 0
    num_virtual_tokens: int = 20
    steps: int = 100
    prompt_learning_rate: float = 2e-2
    prefix_learning_rate: float = 1e-2
    batch_size: int = 8
    max_length: int = 32
    quick: bool = False


@dataclass(frozen=True)
class EncoderOptions:
    """The options of the demo on an encoder; `softhooks demo --help` describes them.

    The default epochs and learning rates were chosen on part of the training rows, not on the test rows.
    """

    output: Path = Path("softhooks-demo")
    model: str | None = None
    seed: int = 0
    num_virtual_tokens: int = 16
    head_epochs: float = 6
    prompt_epochs: float = 4
    prefix_epochs: float = 4
    head_learning_rate: float = 2e-2
    prompt_learning_rate: float = 3e-2
    prefix_learning_rate: float = 1e-2
    batch_size: int = 16
    max_length: int = 32
    test_fraction: float = 1 / 3
    quick: bool = False

"""What every test shares: no network, one thread, Hypothesis profiles, quiet libraries."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
import transformers

from softhooks.inject import interface

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

_COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "derandomize": True}
hypothesis.settings.register_profile("quick", max_examples=5, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=150, **{**_COMMON, "derandomize": False})
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_prompt_left() -> Iterator[None]:
    """Collect models that a test dropped with a prompt still on, so that the next test finds the attention functions bare."""
    yield
    if interface._users:
        gc.collect()

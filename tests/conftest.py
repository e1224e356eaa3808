"""Shared by all tests: no network, one thread, Hypothesis profiles, quiet libraries."""

from __future__ import annotations

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for the threads that tests start; they compare bits
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from hub_stand_in import HubStandIn, connect
from untouched import leave_libraries_alone

from softhooks import constraint
from softhooks.backbone import attention_interface
from softhooks.trainer import trainer_patches

collect_ignore = ["serving_real", "sglang_real"]  # need environments of their own: `make test-vllm`, `make test-sglang`
if "SOFTHOOKS_LLAMA_CPP" not in os.environ:  # the Python with xllamacpp, set by `make test-llama-cpp`
    collect_ignore.append("serving_llama_cpp")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

_COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "derandomize": True}
hypothesis.settings.register_profile("quick", max_examples=5, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=150, **{**_COMMON, "derandomize": False})
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_finish() -> None:
    """After all imports: thousands of garbage collections took a third of the tests' time."""
    leave_libraries_alone()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_prompt_left() -> None:
    """Collect models that the previous test dropped with a prompt on, so that the libraries are unpatched."""
    shared = (attention_interface.users, constraint.watched, trainer_patches.callbacks, trainer_patches.logged_savers)
    if any(shared):
        gc.collect()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in for the Hub, which huggingface_hub and transformers use in this test."""
    with HubStandIn().running() as hub, connect(hub, tmp_path / "hub-cache", monkeypatch):
        yield hub

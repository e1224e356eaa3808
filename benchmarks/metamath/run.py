"""A run: load, train, test, save, and write the result, however the run ends."""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from benchmarks.metamath import data, record
from benchmarks.metamath.contestants import build
from benchmarks.metamath.experiment import Experiment
from benchmarks.metamath.memory import Memory
from benchmarks.metamath.record import Outcome
from benchmarks.metamath.settings import Settings
from benchmarks.metamath.training import Training


@dataclass(frozen=True)
class Places:
    """Where data come from and results go.

    Attributes:
        dataset_dir: a directory of data instead of the Hub.
        output: the directory of the results.
        checkpoints: what was trained is saved to a subdirectory; None deletes it.
    """

    dataset_dir: Path | None
    output: Path
    checkpoints: Path | None = None


def run(experiment: Experiment, settings: Settings, places: Places) -> tuple[Outcome, Path]:
    """Run an experiment and write its result, also if an error or Ctrl-C ends it.

    Returns:
        the outcome and the path of the result file.
    """
    began = time.perf_counter()
    outcome = Outcome(dt.datetime.now(tz=dt.UTC).replace(microsecond=0).isoformat())
    plain = settings == Settings.of(experiment.training) and places.dataset_dir is None
    try:
        _execute(experiment, settings, places, outcome, published=plain)
    except KeyboardInterrupt:
        outcome.status, outcome.error = "canceled", "canceled by the user"
    except Exception as error:  # noqa: BLE001 - every error is recorded, and the command then exits with status 1
        outcome.status, outcome.error = "failed", f"{type(error).__name__}: {error}"
    outcome.total_time = time.perf_counter() - began
    result = record.as_json(outcome, experiment, settings, hub_data=places.dataset_dir is None)
    return outcome, record.write(result, places.output, with_defaults=plain)


def _execute(experiment: Experiment, settings: Settings, places: Places, outcome: Outcome, *, published: bool) -> None:
    set_seed(settings.seed)
    memory = Memory()
    outcome.accelerator = memory.accelerator
    tokenizer = load_tokenizer(settings)
    rows = data.load(places.dataset_dir)
    model = AutoModelForCausalLM.from_pretrained(
        settings.model_id,
        dtype=getattr(torch, settings.dtype),
        device_map=memory.device,
        attn_implementation=settings.attn_implementation,
    )
    contestant = build(experiment, settings, model, tokenizer, rows.train)
    outcome.config = contestant.config
    outcome.trainable, outcome.total = contestant.counts
    training = Training(contestant, tokenizer, rows, settings, memory, outcome.log, published)
    began = time.perf_counter()
    try:
        training.run()
    finally:
        outcome.train_time = time.perf_counter() - began - outcome.log.evaluating
        outcome.peak = memory.peak
    contestant.check()
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) if places.checkpoints is None else places.checkpoints / experiment.label
        outcome.file_size = contestant.saved_bytes(kept)


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Load the tokenizer; the padding token is EOS, so that the first padding token teaches the model to stop."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = settings.max_seq_length
    return tokenizer

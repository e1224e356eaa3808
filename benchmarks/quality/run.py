"""Execute one run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import lru_cache

import torch
from transformers import set_seed

from benchmarks.environment import machine, versions
from benchmarks.quality import baselines, models, tasks
from benchmarks.quality.contestants import CONTESTANTS
from benchmarks.quality.inputs import DecoderInputs, EncoderInputs
from benchmarks.quality.records import Record, Run
from benchmarks.quality.scoring import score_decoder, score_encoder
from benchmarks.quality.setup import Setup
from benchmarks.quality.task import Row, Task
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import BATCH, WARMUP, train
from benchmarks.result import today

NO_MODEL = "none"
"""The model of the baselines that need none."""

WITHOUT_MODEL = {
    "majority": baselines.majority,
    "tfidf": baselines.tfidf,
    "first_sentence": baselines.first_sentence,
}
PARTS = ("train", "development", "test")
ZERO_SHOT, FEW_SHOT = "zero_shot", "few_shot"


def execute(run: Run) -> Record:
    """Train and score a contestant, or score a baseline."""
    task = read_task(run.task)
    rows = task.development if run.part == "development" else task.test
    options = dict(run.options)
    train_rows = task.sample(run.shots, run.seed)
    start = time.perf_counter()
    if run.contestant in WITHOUT_MODEL:
        record = Record(run, WITHOUT_MODEL[run.contestant](task, train_rows, rows), seconds=time.perf_counter() - start)
    elif run.contestant in (ZERO_SHOT, FEW_SHOT) or "in_context" in options:
        record = _prompted(run, task, train_rows, rows)
    else:
        record = _tuned(run, task, train_rows, rows)
    for name in options.get("source_tasks", ()):
        record.versions.update(tasks.TASKS[name]().provenance)
    record.versions.update(
        versions(),
        processor=str(machine()["processor"]),
        threads=str(torch.get_num_threads()),
        date=today(),
        **task.provenance,
    )
    record.extra["rows"] = {part: len(getattr(task, part)) for part in PARTS}
    return record


@lru_cache(maxsize=1)
def read_task(name: str) -> Task:
    """Read a task."""
    return TASKS[name]()


def _prompted(run: Run, task: Task, train_rows: list[Row], rows: Sequence[Row]) -> Record:
    """Score a language model with the instruction, and examples, in its context."""
    options = dict(run.options)
    inputs = _inputs(run, task.with_template(options.get("template", 0)))
    assert isinstance(inputs, DecoderInputs)
    if run.contestant == ZERO_SHOT:
        context = inputs.context([])
    elif run.contestant == FEW_SHOT:
        context = baselines.few_shot_context(inputs, train_rows, options.get("examples"))
    else:
        context = inputs.document() if options["in_context"] else []
    model = models.language_model(run.model)
    start = time.perf_counter()
    scores = score_decoder(model, inputs, rows, context)
    seconds = time.perf_counter() - start
    return Record(
        run,
        scores,
        context_tokens=len(context),
        seconds=seconds,
        peak_bytes=peak_bytes(),
        extra={"scoring_seconds": seconds},
    )


def _tuned(run: Run, task: Task, train_rows: list[Row], rows: Sequence[Row]) -> Record:
    """Train a contestant and score it."""
    inputs = _inputs(run, task)
    checkpoint = models.checkpoint(run.model)
    set_seed(run.seed)  # for a new head
    if isinstance(inputs, EncoderInputs):
        model = checkpoint.classifier(inputs.tokenizer, task.labels)
    else:
        model = models.language_model(run.model)
    trained = train(
        CONTESTANTS[run.contestant],
        model,
        Setup(task, inputs, train_rows, dict(run.options), run.seed, run.learning_rate),
        steps=run.steps,
    )
    peak = peak_bytes()
    start = time.perf_counter()
    if isinstance(inputs, EncoderInputs):
        scores = score_encoder(trained.model, inputs, rows)
    else:
        scores = score_decoder(trained.model, inputs, rows)
    return Record(
        run,
        scores,
        trained=trained.trained,
        saved_bytes=trained.saved_bytes,
        seconds=trained.seconds,
        peak_bytes=peak,
        losses=trained.losses,
        extra={
            "scoring_seconds": time.perf_counter() - start,
            "batch_size": BATCH,
            "warmup": WARMUP,
            "precision": str(models.PRECISIONS[run.model]).removeprefix("torch."),
        },
    )


def _inputs(run: Run, task: Task) -> EncoderInputs | DecoderInputs:
    tokenizer = models.checkpoint(run.model).tokenizer()
    return EncoderInputs(task, tokenizer) if models.is_encoder(run.model) else DecoderInputs(task, tokenizer)


def peak_bytes() -> int:
    """Return the peak memory of this process so far. Each run is a process of its own, so this is the run's. 0 on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start_process(threads: int) -> None:
    """Prepare a process for a run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(threads)

"""Train a prompt on source tasks, for experiments on transfer."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable

from transformers import set_seed

from benchmarks.quality import models, tasks
from benchmarks.quality.inputs import DecoderInputs, Rows
from benchmarks.quality.setup import Prepared, Setup
from benchmarks.quality.training import fit
from softhooks.method import Method
from softhooks.trainer.callback import SoftPromptCallback

OPTIONS = frozenset({"source_tasks", "source_shots", "source_steps"})
"""Options of a run that the methods do not have."""


def source_prompt(setup: Setup, method: Callable[[list[str]], Method]) -> str:
    """Train a prompt on rows of the source tasks, mixed in each batch, and return the directory in which it is saved.

    The directory is deleted when the process ends.

    Args:
        method: makes the method from the names of the tasks.
    """
    directory = tempfile.mkdtemp(prefix="source-prompt-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    callback = SoftPromptCallback(method(list(setup.options["source_tasks"])), check_frozen=False)
    prepared = Prepared(models.language_model(models.SMOLLM2), [callback], dataset=_rows(setup))
    set_seed(setup.seed)
    fit(prepared, setup, steps=setup.options["source_steps"])
    assert callback.soft_prompt is not None  # attached by the callback
    callback.soft_prompt.save_pretrained(directory)
    return directory


def _rows(setup: Setup) -> Rows:
    """Return rows of all source tasks; `task_ids` is the number of a row's task."""
    rows = []
    for number, name in enumerate(setup.options["source_tasks"]):
        task = tasks.TASKS[name]()
        inputs = DecoderInputs(task, setup.inputs.tokenizer)
        encoded = inputs.dataset(task.sample(setup.options["source_shots"], setup.seed)).rows
        rows += [row | {"task_ids": number} for row in encoded]
    return Rows(rows)

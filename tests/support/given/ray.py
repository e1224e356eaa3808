"""Names that the example of Ray expects: also Ray itself, started small, with workers that find the tests' modules."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import training
import transformers as tf
import zoo


def start() -> None:
    """Start Ray on this machine."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(zoo.__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", object_store_memory=100 * 2**20)


def names() -> dict[str, Any]:
    """A function that makes a tiny model, its data, and arguments of a quiet Trainer."""
    start()
    options = {**training.QUIET, "save_strategy": "steps", "save_steps": 2, "output_dir": tempfile.mkdtemp()}
    load_model = functools.partial(zoo.build, "llama")
    return {
        "load_model": load_model,
        "model": load_model(),
        "dataset": training.rows("causal"),
        "options": options,
        "Trainer": tf.Trainer,
        "TrainingArguments": tf.TrainingArguments,
    }

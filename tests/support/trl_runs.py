"""Tiny runs of TRL's trainers, as scripts would make them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import transformers as tf
import trl
import zoo
from datasets import Dataset

from softhooks import SoftPromptCallback

GIVEN = runpy.run_path(str(Path(__file__).parent / "given" / "trl.py"))
plain_tokenizer = GIVEN["plain_tokenizer"]
TOKENIZER = plain_tokenizer()
PAIRS: Dataset = GIVEN["names"]()["dataset"]
DOCUMENTS = [zoo.text(1, length, seed=length)[0].tolist() for length in (5, 7, 3, 6, 4, 9)]
TEXTS = Dataset.from_dict({"input_ids": DOCUMENTS})
JUDGED = Dataset.from_dict(
    {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [row % 3 != 0 for row in range(8)]}
)
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
SMALL = {**QUIET, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "max_steps": 3, "seed": 1}
DATA = {"SFT": TEXTS, "DPO": PAIRS, "KTO": JUDGED, "Reward": PAIRS, "GRPO": PAIRS.select_columns(["prompt"])}
DATA["RLOO"] = DATA["GRPO"]


def various(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward: how many different tokens there are."""
    return [float(len(set(ids))) for ids in completion_ids]


def make(
    kind: str, folder: Path, model: Any, callbacks: Any, given: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A trainer as a script would make it; `given` goes to the trainer, `options` to its arguments."""
    own: dict[str, Any] = {}
    if kind in ("GRPO", "RLOO"):
        own = {"num_generations": 4, "max_completion_length": 5, "beta": 0.0}
        given = {"reward_funcs": various, **(given or {})}
    arguments = getattr(trl, f"{kind}Config")(str(folder), **{**SMALL, **own, **options})
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments,
        callbacks=callbacks,
        **{"train_dataset": DATA[kind], "processing_class": TOKENIZER, **(given or {})},
    )
    trainer.remove_callback(tf.PrinterCallback)
    return trainer


def prompted(kind: str, folder: Path, model: Any, method: Any, **more: Any) -> tuple[Any, SoftPromptCallback]:
    """A trainer with a SoftPromptCallback."""
    callback = SoftPromptCallback(method)
    return make(kind, folder, model, [callback], **more), callback


def build(kind: str, **changes: Any) -> Any:
    return zoo.build("llama", "sequence", num_labels=1) if kind == "Reward" else zoo.build("llama", **changes)


def metrics(trainer: Any) -> list[dict[str, float]]:
    """The trainer's logs without times, and without the token counts that TRL restarts when a run is resumed."""
    return [
        {
            key: value
            for key, value in entry.items()
            if "time" not in key and "per_second" not in key and key != "num_tokens"
        }
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]

"""A prompt on a sentence model in one of two processes: `sentences.py FOLDER`; writes its results to `rankN.pt`.

The model lies in `FOLDER/base`: only rank 0 could write it here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import sentence_models as made
import torch
import training
from accelerate.state import PartialState
from datasets import Dataset
from launch import leave
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from softhooks import PrefixTuning
from softhooks.integrations.sentence_transformers import SentencePromptCallback

METHOD = PrefixTuning(3, projection=True, hidden_size=8)
TOGETHER = 4  # rows in a step, over all processes


def train(folder: Path, base: Path, checkpoint: str | None = None, processes: int = 1) -> dict[str, Any]:
    """Train or resume; return the trained parameters and a text's embedding."""
    model = SentenceTransformer(str(base), device="cpu")
    scores = [1.0, 0.0, 0.5, 0.9, 0.1, 0.3, 0.7, 0.2]
    data = Dataset.from_dict({"first": made.TEXTS, "second": made.TEXTS[::-1], "score": scores})
    torch.manual_seed(7)
    callback = SentencePromptCallback(METHOD)
    options = {"per_device_train_batch_size": TOGETHER // processes, "save_strategy": "steps", "save_steps": 2}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=made.arguments(folder, **options, **({"ddp_backend": "gloo"} if processes > 1 else {})),
        train_dataset=data,
        loss=CosineSimilarityLoss(model),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert callback.report is not None
    return {
        "losses": training.losses(trainer),
        "trained": training.trained(callback),
        "embedded": model.encode(made.TEXTS, convert_to_tensor=True),
    }


def main() -> None:
    """Train, resume on a new model, and write both results."""
    folder = Path(sys.argv[1])
    state = PartialState(cpu=True, backend="gloo")
    rank = state.process_index
    whole = train(folder / "whole", folder / "base", processes=state.num_processes)
    state.wait_for_everyone()
    checkpoint = str(folder / "whole" / "checkpoint-2")
    resumed = train(folder / "resumed", folder / "base", checkpoint, processes=state.num_processes)
    torch.save({"whole": whole, "resumed": resumed}, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main()

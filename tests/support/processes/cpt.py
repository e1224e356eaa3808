"""Context-aware prompt tuning in one of two processes: `cpt.py FOLDER`; writes its results to `rankN.pt`."""

from __future__ import annotations

import sys
from pathlib import Path

import contexts
import cpt_training
import torch
from accelerate.state import PartialState
from launch import leave


def train(folder: Path) -> torch.Tensor:
    """Train three steps in two processes, each with two rows and two micro-batches."""
    trainer, callback = cpt_training.make(
        folder, cpt_training.model_of(), contexts.method(), optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
        ddp_backend="gloo",
    )  # fmt: skip
    assert trainer.args.world_size == 2
    trainer.train()
    assert callback.soft_prompt is not None
    return callback.soft_prompt.encoder.delta.detach().clone()


def main() -> None:
    """Train, write the results, and leave the process group in an order that gloo supports."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = PartialState(cpu=True, backend="gloo").process_index
    torch.save({"delta": train(folder)}, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main()

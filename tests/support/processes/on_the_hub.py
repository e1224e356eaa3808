"""Train a prompt in a Trainer, push it, and load it with its base: `on_the_hub.py FOLDER BASE REPOSITORY`.

The Hub is the one that the environment variables name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import training
import transformers as tf
import zoo

import softhooks
from softhooks import PromptTuning


def main(folder: Path, base: str, repository: str) -> None:
    """Train and push; the loaded prompt must compute what the trained one computes."""
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    trainer, _ = training.prompted(
        folder, model, "causal", PromptTuning(4), push_to_hub=True, hub_model_id=repository, hub_strategy="end"
    )
    trainer.train()
    trainer.push_to_hub()
    with torch.no_grad():
        expected = model.eval()(zoo.text()).logits
        found = softhooks.load_model(repository)(zoo.text()).logits
    assert torch.equal(found, expected)
    print("the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

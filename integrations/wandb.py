"""Weights & Biases beside a prompt that trains: the prompt as an artifact, the words that it lies near, what it is.

The curves of a prompt (norm, gradient, distance from the start, gates, share projected) need nothing of this: they reach
`report_to="wandb"` by themselves, as `train/soft_prompt/*`, and `WANDB_LOG_MODEL` uploads checkpoints that hold the prompt only.
This callback adds to the Trainer's run, offline (`WANDB_MODE=offline`) as online,

- the method, its options and the number of its parameters, in the run's configuration under `soft_prompt`;
- at the end of training (of the best model, where that is loaded) an artifact of the type `soft-prompt`, from which
  `softhooks.load(model, artifact.download())` loads;
- with a tokenizer, a table of the words nearest to each virtual token, `soft_prompt/words`.

Refused by name, before a step: no run that is under way; a tokenizer for a prompt that enters as keys and values, or in a
sharded model.

Versions tested: wandb 0.31.0

Example:
    from transformers import Trainer

    from softhooks import PromptTuning, SoftPromptCallback
    from softhooks.integrations.wandb import PromptArtifact

    trainer = Trainer(
        model=model,
        args=args,  # report_to="wandb"
        train_dataset=dataset,
        callbacks=[SoftPromptCallback(PromptTuning(num_virtual_tokens=20)), PromptArtifact(tokenizer)],
    )
    trainer.train()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt
from softhooks.similarity import Word

from ._experiment_tracking import ABOUT, WORDS, PromptTracker, table_of
from ._imports import import_framework

__all__ = ["PromptArtifact"]

KIND = "soft-prompt"
"""The type of the artifact."""


class PromptArtifact(PromptTracker):
    """Keep the prompt that a Trainer trains in its run of Weights & Biases.

    Args:
        tokenizer: the model's tokenizer; None: no table of nearest words.
        name: of the artifact; None: `soft-prompt-` and the run's id.
        words: how many of the nearest words for each virtual token.

    Raises:
        SoftHooksError: wandb is not installed.
    """

    def __init__(self, tokenizer: Any = None, *, name: str | None = None, words: int = 5) -> None:
        super().__init__(tokenizer, words=words)
        _wandb()
        self._name = name
        self._about: dict[str, Any] = {}

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Note what the prompt is.

        Raises:
            TrainerError: no run is under way.
        """
        self._about = about
        self._run().config.update({ABOUT: about}, allow_val_change=True)

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Log the artifact and the table."""
        wandb, run = _wandb(), self._run()
        if words:
            table = wandb.Table(columns=list(WORDS), data=[list(line) for line in table_of(words)])
            run.log({f"{ABOUT}/words": table, "train/global_step": state.global_step})
        artifact = wandb.Artifact(self._name or f"{KIND}-{run.id}", type=KIND, metadata=self._about)
        artifact.add_dir(str(folder))
        run.log_artifact(artifact, aliases=[f"step-{state.global_step}"])

    def _run(self) -> Any:
        run = _wandb().run
        if run is None:
            raise TrainerError(
                "PromptArtifact adds to a run of Weights & Biases; none is under way.",
                "Set report_to='wandb', which starts one, or call `wandb.init()` before `train()`.",
                run=None,
            )
        return run


def _wandb() -> Any:
    return import_framework("wandb", "Weights & Biases", "wandb")

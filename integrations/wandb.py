"""Weights & Biases: log a trained prompt as an artifact, with its options and its nearest words.

With `report_to="wandb"`, the Trainer logs the prompt's metrics even without this callback, and `WANDB_LOG_MODEL` uploads
checkpoints that hold only the prompt. The callback adds to the Trainer's run, even with `WANDB_MODE=offline`:

- the method, its options and the number of parameters, in the run's configuration under `soft_prompt`;
- at the end of training, an artifact of type `soft-prompt`; load it with `softhooks.load(model, artifact.download())`;
- with a tokenizer, a table of the words nearest to each virtual token, as `soft_prompt/words`.

These raise an error before the first step: no active run; a tokenizer, if the prompt consists of keys and values or the
model is sharded.

Versions tested: wandb 0.31.0

Example:
    from transformers import Trainer

    from softhooks import PromptTuning, SoftPromptCallback
    from softhooks.integrations.wandb import PromptArtifact

    callbacks = [SoftPromptCallback(PromptTuning(num_virtual_tokens=20)), PromptArtifact(tokenizer)]
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=callbacks)  # args: report_to="wandb"
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


class PromptArtifact(PromptTracker):
    """Records a prompt in the Trainer's Weights & Biases run.

    Args:
        tokenizer: the model's tokenizer; None to log no nearest words.
        name: the name of the artifact; None for `soft-prompt-` followed by the run's id.
        words: the number of nearest words for each virtual token.

    Raises:
        SoftHooksError: wandb is not installed.
    """

    def __init__(self, tokenizer: Any = None, *, name: str | None = None, words: int = 5) -> None:
        super().__init__(tokenizer, words=words)
        _wandb()
        self._name = name
        self._about: dict[str, Any] = {}

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Log the options."""
        self._about = about
        self._run().config.update({ABOUT: about}, allow_val_change=True)

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Log the artifact and the table of nearest words."""
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
                "there is no active Weights & Biases run for PromptArtifact to log to.",
                "Set report_to='wandb', which starts a run, or call `wandb.init()` before `train()`.",
            )
        return run


def _wandb() -> Any:
    return import_framework("wandb", "Weights & Biases", "wandb")

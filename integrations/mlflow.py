"""MLflow: log a trained prompt with its options and nearest words, and log each trial of a search as a run.

With `report_to="mlflow"`, the Trainer logs the prompt's metrics even without this callback. The callback adds to the
Trainer's run:

- the method, its options and the number of trained parameters, as MLflow parameters `soft_prompt.*` (truncated to MLflow's
  maximum length; the full options are in the artifact's `soft_prompt.json`);
- at the end of training, the prompt's files as the artifact `soft_prompt`; load them with
  `softhooks.load(model, mlflow.artifacts.download_artifacts(run_id=..., artifact_path="soft_prompt"))`;
- with a tokenizer, the words nearest to each virtual token, as `soft_prompt_words.tsv`;
- in a hyperparameter search, one run for each trial, nested in the script's run if there is one; without the callback, only the
  first trial has a run. The last run ends when the process ends or calls `mlflow.end_run()`.

MLflow writes to local files (`MLFLOW_TRACKING_URI=file:...`) only with `MLFLOW_ALLOW_FILE_STORE=true`. Set
`MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE=1` too: otherwise several threads of MLflow may try to create the same directory, and
a metric is then lost ("Failed to log run data: File exists").

An error is raised before the first step if no run is active, if `HF_MLFLOW_LOG_ARTIFACTS` is set (every checkpoint would be
logged as a `pyfunc` model, although checkpoints hold only a prompt), or if you pass a tokenizer and the prompt consists of keys
and values or the model is sharded.

Versions tested: mlflow-skinny 3.17.2

Example:
    from transformers import Trainer

    from softhooks import PromptTuning, SoftPromptCallback
    from softhooks.integrations.mlflow import PromptArtifact

    callbacks = [SoftPromptCallback(PromptTuning(num_virtual_tokens=20)), PromptArtifact(tokenizer)]
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=callbacks)  # args: report_to="mlflow"
    trainer.train()
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt
from softhooks.similarity import Word

from ._experiment_tracking import ABOUT, WORDS, PromptTracker, table_of
from ._imports import import_framework

__all__ = ["PromptArtifact"]

_TRUE = ("1", "TRUE", "ON", "YES")
_EAGER = "HF_MLFLOW_LOG_ARTIFACTS"


class PromptArtifact(PromptTracker):
    """Records a prompt in the Trainer's MLflow run.

    Args:
        tokenizer: the model's tokenizer; None to log no nearest words.
        words: the number of nearest words for each virtual token.

    Raises:
        SoftHooksError: MLflow is not installed.
    """

    def __init__(self, tokenizer: Any = None, *, words: int = 5) -> None:
        super().__init__(tokenizer, words=words)
        _mlflow()
        self._outer: str | None = None  # the run that the script started
        self._run_id: str | None = None
        self._is_over = True

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record whether the script has started a run."""
        self._outer = _active()

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Log the options; in a search, log them in the trial's run."""
        if os.environ.get(_EAGER, "").upper() in _TRUE:
            raise TrainerError(
                f"{_EAGER}={os.environ[_EAGER]} would log each checkpoint as a `pyfunc` model, but checkpoints hold "
                "only a prompt.",
                f"Unset {_EAGER}; PromptArtifact logs the prompt's files.",
            )
        self._run_id = self._of_trial(state) if state.is_hyper_param_search else _active()
        if self._run_id is None:
            raise TrainerError(
                "there is no active MLflow run for PromptArtifact to log to.",
                "Set report_to='mlflow', which starts a run, or call `mlflow.start_run()` before `train()`.",
            )
        _mlflow().log_params({f"{ABOUT}.{key}": _short(value) for key, value in about.items()})

    def _of_trial(self, state: TrainerState) -> str:
        """Return the id of a trial's run, and start the run if the Trainer's reporter has not done so."""
        mlflow, last = _mlflow(), self._run_id
        if last is not None and _active() == last:
            mlflow.end_run("FINISHED" if self._is_over else "FAILED")
        self._is_over, own = False, _active()
        if own is not None and own != self._outer:
            return own
        run = mlflow.start_run(run_name=state.trial_name, nested=own is not None)
        mlflow.log_params({key: _short(value) for key, value in (state.trial_params or {}).items()})
        return str(run.info.run_id)

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Log the prompt's files and nearest words."""
        mlflow = _mlflow()
        mlflow.flush_async_logging()  # MLflow also reads the run's metrics, which may be only partly written
        client = mlflow.MlflowClient()  # which can log to a run that the reporter has ended
        client.log_artifacts(self._run_id, str(folder), ABOUT)
        if words:
            lines = ["\t".join(WORDS), *("\t".join(map(_cell, line)) for line in table_of(words))]
            client.log_text(self._run_id, "\n".join(lines) + "\n", f"{ABOUT}_words.tsv")
        self._is_over = True
        if (
            state.is_hyper_param_search and _active() != self._run_id
        ):  # the trial's last evaluation is still to be logged
            mlflow.start_run(run_id=self._run_id, nested=_active() is not None)


def _active() -> str | None:
    run = _mlflow().active_run()
    return None if run is None else str(run.info.run_id)


def _cell(value: Any) -> str:
    """Return a value as text, with tabs and line breaks escaped as in JSON."""
    text = str(value)
    return text if text.isprintable() and text else json.dumps(text)


def _short(value: Any) -> str:
    """Return a value as text, truncated to the maximum length of an MLflow parameter."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_PARAM_VAL_LENGTH else f"{text[: MAX_PARAM_VAL_LENGTH - 3]}..."


def _mlflow() -> Any:
    return import_framework("mlflow", "MLflow", "mlflow")

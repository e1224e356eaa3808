"""MLflow beside a prompt that trains: the prompt as an artifact, the words that it lies near, what it is, a run for each trial.

The curves of a prompt (norm, gradient, distance from the start, gates, share projected) need nothing of this: they reach
`report_to="mlflow"` by themselves, as `soft_prompt/*`. This callback adds to the Trainer's run, on a server or in local files,

- the method, its options and the number of its parameters, as parameters `soft_prompt.*` (cut to MLflow's length; the
  artifact's `soft_prompt.json` has them whole);
- at the end of training (of the best model, where that is loaded) the prompt's files as the artifact `soft_prompt`, from which
  `softhooks.load(model, mlflow.artifacts.download_artifacts(run_id=..., artifact_path="soft_prompt"))` loads;
- with a tokenizer, the words nearest to each virtual token, `soft_prompt_words.tsv`;
- in a hyperparameter search a run for each trial (inside the script's own, if it has one), where the Trainer's own reporter
  starts one for the first only; the last one ends with the process, or with `mlflow.end_run()`.

MLflow writes to local files (`MLFLOW_TRACKING_URI=file:...`) only with `MLFLOW_ALLOW_FILE_STORE=true`. Set
`MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE=1` there too: its threads race for the folder of a metric with a slash in its name, and
who loses drops a point ("Failed to log run data: File exists").

Refused by name, before a step: no run that is under way; `HF_MLFLOW_LOG_ARTIFACTS`, which logs every checkpoint as a model that
`pyfunc` could load, and a prompt is none; a tokenizer for a prompt that enters as keys and values, or in a sharded model.

Versions tested: mlflow-skinny 3.17.2

Example:
    from transformers import Trainer

    from softhooks import PromptTuning, SoftPromptCallback
    from softhooks.integrations.mlflow import PromptArtifact

    trainer = Trainer(
        model=model,
        args=args,  # report_to="mlflow"
        train_dataset=dataset,
        callbacks=[SoftPromptCallback(PromptTuning(num_virtual_tokens=20)), PromptArtifact(tokenizer)],
    )
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
    """Keep the prompt that a Trainer trains in its run of MLflow.

    Args:
        tokenizer: the model's tokenizer; None: no table of nearest words.
        words: how many of the nearest words for each virtual token.

    Raises:
        SoftHooksError: MLflow is not installed.
    """

    def __init__(self, tokenizer: Any = None, *, words: int = 5) -> None:
        super().__init__(tokenizer, words=words)
        _mlflow()
        self._outer: str | None = None  # the script's own run
        self._run_id: str | None = None
        self._is_over = True

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note whether a run of the script's own is under way."""
        self._outer = _active()

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Note what the prompt is; in a search, in the trial's run.

        Raises:
            TrainerError: no run is under way, or checkpoints are to be logged as models.
        """
        if os.environ.get(_EAGER, "").upper() in _TRUE:
            raise TrainerError(
                "a checkpoint of a prompt is no model that `pyfunc` could load.",
                f"Unset {_EAGER}: PromptArtifact keeps the prompt's files.",
                **{_EAGER: os.environ[_EAGER]},
            )
        self._run_id = self._of_trial(state) if state.is_hyper_param_search else _active()
        if self._run_id is None:
            raise TrainerError(
                "PromptArtifact adds to a run of MLflow; none is under way.",
                "Set report_to='mlflow', which starts one, or call `mlflow.start_run()` before `train()`.",
                run=None,
            )
        _mlflow().log_params({f"{ABOUT}.{key}": _short(value) for key, value in about.items()})

    def _of_trial(self, state: TrainerState) -> str:
        """The run of a trial: the one that the reporter has just started for the first, a new one for each other."""
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
        """Log files and words. The reporter may have ended the run; a trial's waits for the evaluation that follows."""
        mlflow = _mlflow()
        mlflow.flush_async_logging()  # to find a run's artifacts, MLflow reads its metrics, which may be half written
        client = mlflow.MlflowClient()
        client.log_artifacts(self._run_id, str(folder), ABOUT)
        if words:
            lines = ["\t".join(WORDS), *("\t".join(map(_cell, line)) for line in table_of(words))]
            client.log_text(self._run_id, "\n".join(lines) + "\n", f"{ABOUT}_words.tsv")
        self._is_over = True
        if state.is_hyper_param_search and _active() != self._run_id:
            mlflow.start_run(run_id=self._run_id, nested=_active() is not None)


def _active() -> str | None:
    run = _mlflow().active_run()
    return None if run is None else str(run.info.run_id)


def _cell(value: Any) -> str:
    """A value in one cell of a table; tabs and line ends as they are escaped in JSON."""
    text = str(value)
    return text if text.isprintable() and text else json.dumps(text)


def _short(value: Any) -> str:
    """A parameter as MLflow takes it."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_PARAM_VAL_LENGTH else f"{text[: MAX_PARAM_VAL_LENGTH - 3]}..."


def _mlflow() -> Any:
    return import_framework("mlflow", "MLflow", "mlflow")

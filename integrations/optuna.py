"""Optuna: search over methods, prompt lengths, initializations and learning rates.

Define the search with a `PromptSpace`. Pass its `callback()` to a Trainer instead of a `SoftPromptCallback`, and the space itself
as the `hp_space` of `trainer.hyperparameter_search`. Each trial trains a new prompt on the model that `model_init` returns.
`model_init` may return the same model each time, because the base does not change. For your own study, use
`space.objective(model, train)`.

Load the best prompt from its checkpoint (`checkpoint_of`), or apply its options to the Trainer (`settle`) and train again.

These raise an error: a space without candidates; options that a method does not have; searches with several threads (`n_jobs`),
which would share a model; trials of another space.

Versions tested: optuna 5.0.0

Example:
    from transformers import Trainer

    import softhooks
    from softhooks import PrefixTuning, PromptTuning
    from softhooks.integrations.optuna import Candidate, PromptSpace, checkpoint_of

    space = PromptSpace(
        prompt=Candidate(PromptTuning, num_virtual_tokens=[8, 20], learning_rate=(1e-3, 1e-1), init=["vocab", "random"]),
        prefix=Candidate(PrefixTuning, num_virtual_tokens=range(4, 17, 4), learning_rate=(1e-4, 1e-2)),
    )
    trainer = Trainer(
        model_init=lambda: model, args=args, train_dataset=dataset, eval_dataset=dataset, callbacks=[space.callback()]
    )
    best = trainer.hyperparameter_search(space, backend="optuna", direction="minimize", n_trials=4)
    prompt = softhooks.load(trainer.model_init(), checkpoint_of(best, args), name="best")
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from softhooks.attach import attach
from softhooks.errors import CheckpointError, OptionError, TrainerError
from softhooks.integration_support.training import SoftPromptCallback
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._imports import import_framework
from ._search_space import Candidate, Chosen

__all__ = ["METHOD", "Candidate", "Chosen", "PromptSpace", "checkpoint_of"]

METHOD = "method"
"""The trial parameter whose value is the name of the candidate."""


class PromptSpace:
    """A search space of named candidates: methods, each with the values to try for its options.

    To search over other arguments of the Trainer, pass `hp_space=lambda trial: {**space(trial), "num_train_epochs": ...}`.

    Args:
        candidates: the candidates by name.

    Raises:
        OptionError: there are no candidates.
    """

    def __init__(self, **candidates: Candidate) -> None:
        if not candidates:
            raise OptionError(
                "the PromptSpace has no candidates.",
                "Pass some, such as prompt=Candidate(PromptTuning, num_virtual_tokens=[8, 20], learning_rate=(1e-3, 1e-1)).",
            )
        self.candidates = candidates

    def suggest(self, trial: Any) -> Chosen:
        """Choose the method and the learning rate of a trial. Repeated calls for one trial make the same choice."""
        names = list(self.candidates)
        name = names[0] if len(names) == 1 else trial.suggest_categorical(METHOD, names)
        return self.candidates[name].suggest(trial, name)

    def __call__(self, trial: Any) -> dict[str, float]:
        """Return the Trainer's arguments for a trial."""
        return {"learning_rate": self.suggest(trial).learning_rate}

    def chosen(self, found: Any) -> Chosen:
        """Return the method and the learning rate of a finished trial.

        Args:
            found: the best run of a Trainer's search, a trial of a study, or the parameters of a trial.

        Raises:
            OptionError: the trial is from another space.
        """
        parameters = next(
            (getattr(found, name) for name in ("hyperparameters", "params") if hasattr(found, name)), found
        )
        try:
            return self.suggest(_optuna().trial.FixedTrial(dict(parameters)))
        except (ValueError, KeyError) as error:
            raise OptionError(
                "the trial's parameters do not fit this PromptSpace.",
                "Call `chosen` on the PromptSpace that the search used.",
                parameters=dict(parameters),
                candidates=", ".join(self.candidates),
            ) from error

    # --- with a Trainer -----------------------------------------------------------------------------------------------

    def callback(self, **options: Any) -> SoftPromptCallback:
        """Create a callback that trains the method of each trial; `options` are as for `SoftPromptCallback`.

        Outside a search, it trains the method of the trial that was passed to `settle`; if `settle` was not called, it trains
        the first candidate with the first value of each option.
        """
        return _SearchCallback(self, **options)

    def settle(self, found: Any, trainer: Any) -> Chosen:
        """Apply the options of a trial to a Trainer, so that `train()` repeats the trial.

        Args:
            found: as for `chosen`. If it is the best run of a Trainer's search, the run's other arguments are set too.
            trainer: the Trainer that searched, or another one with a `callback()` of this space.

        Raises:
            TrainerError: the Trainer has no callback that this space created.
        """
        chosen = self.chosen(found)
        own = [
            one for one in trainer.callback_handler.callbacks if isinstance(one, _SearchCallback) and one.space is self
        ]
        if not own:
            raise TrainerError(
                "the Trainer has no callback that this PromptSpace created.",
                "Pass `space.callback()` to the Trainer in `callbacks=[...]`.",
                callbacks=", ".join(type(one).__name__ for one in trainer.callback_handler.callbacks),
            )
        own[0].settled = chosen.method
        for name, value in getattr(found, "hyperparameters", {}).items():
            if hasattr(trainer.args, name):
                setattr(trainer.args, name, value)
        trainer.args.learning_rate = chosen.learning_rate
        return chosen

    # --- with your own study -------------------------------------------------------------------------------------------

    def objective(
        self,
        model: nn.Module,
        train: Callable[[SoftPrompt, float, Callable[[float, int], None]], float],
        *,
        save_to: str | Path | None = None,
        **options: Any,
    ) -> Callable[[Any], float]:
        """Return an objective for `study.optimize` that attaches a new prompt in each trial and removes it at the end.

        Args:
            model: the base model, which all trials share.
            train: a function `train(prompt, learning_rate, report)` that returns the trial's value. `report(value, step)`
                reports an intermediate value, and ends the trial if the study prunes it.
            save_to: the directory in which each prompt is saved, as `trial-<number>`; None to save none.
            options: as for `attach`.

        Raises:
            TrainerError: in a trial, if another trial is running on the same model.
            FrozenModifiedError: in a trial, if the base has changed.
        """
        alone = threading.Lock()

        def objective(trial: Any) -> float:
            if not alone.acquire(blocking=False):
                raise _concurrent(trial)

            def report(value: float, step: int) -> None:
                trial.report(value, step)
                if trial.should_prune():
                    raise _optuna().TrialPruned

            try:
                method, rate = self.suggest(trial)
                with attach(model, method, **options) as prompt:
                    value = train(prompt, rate, report)
                    prompt.verify_frozen()
                    if save_to is not None:
                        prompt.save_pretrained(Path(save_to) / f"trial-{trial.number}")
                return float(value)
            finally:
                alone.release()

        return objective


class _SearchCallback(SoftPromptCallback):
    def __init__(self, space: PromptSpace, **options: Any) -> None:
        candidate = next(iter(space.candidates.values()))
        self.space = space
        self.settled = candidate.built({option: values[0] for option, values in candidate.choices.items()})
        self._thread: int | None = None
        super().__init__(self.settled, **options)

    def method_for(self, trial: Any) -> Method:
        if trial is None:
            return self.settled
        if self._thread not in (None, threading.get_ident()):
            raise _concurrent(trial)
        self._thread = threading.get_ident()
        return self.space.suggest(trial).method

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the trial."""
        self._thread = None
        super().on_train_end(args, state, control, **kwargs)


def checkpoint_of(best: Any, args: Any) -> Path:
    """Return the path of the best run's last checkpoint, which `softhooks.load` can load.

    Args:
        best: the result of `hyperparameter_search`.
        args: the Trainer's arguments.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    folder = Path(args.output_dir) / f"run-{best.run_id}"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None:
        raise CheckpointError(
            f"the best run has no checkpoint in {folder}.",
            "Search with save_strategy='steps' or 'epoch' and without `hp_name`, or train the run again after "
            "`space.settle(best, trainer)`.",
        )
    return Path(last)


def _concurrent(trial: Any) -> TrainerError:
    return TrainerError(
        f"trial {trial.number} started while another trial is running on the same Trainer or model.",
        "Search with n_jobs=1; to search in parallel, run several processes that share the study's storage.",
    )


def _optuna() -> Any:
    return import_framework("optuna", "Optuna", "optuna")

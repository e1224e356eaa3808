"""Search with Optuna over methods, their length, their initialization and the learning rate.

A `PromptSpace` says what to try. Its `callback()` takes the place of a `SoftPromptCallback`, and the space itself is the
`hp_space` of `trainer.hyperparameter_search`: each trial trains a new prompt of its own method on the model that `model_init`
returns, which may be one and the same base for all, for it does not move. Pruning works as in any search of the Trainer's. In a
study of one's own, `objective(model, train)` attaches each trial's prompt, proves that the base has not moved, removes the prompt
(also where the trial is pruned or fails), and keeps it in a folder.

The best run comes back from its files (`checkpoint_of`), or by training with what it chose (`settle`). Values are those of the
last evaluation, as the Trainer's search has it.

Refused by name: a space without candidates; options that a method does not have; searches in several threads (`n_jobs`), which
would share one model; runs that belong to another space.

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
from softhooks.errors import CheckpointError, OptionError, TrainerError, format_message
from softhooks.integration_support.training import SoftPromptCallback
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._imports import import_framework
from ._search_space import Candidate, Chosen

__all__ = ["METHOD", "Candidate", "Chosen", "PromptSpace", "checkpoint_of"]

METHOD = "method"
"""The name of the parameter that says which candidate a trial tries."""


class PromptSpace:
    """What a search may choose from: candidates by name.

    The space is itself the `hp_space` of `trainer.hyperparameter_search`; add further arguments of the Trainer with
    `lambda trial: {**space(trial), "num_train_epochs": trial.suggest_int(...)}`.

    Args:
        candidates: the methods to try.

    Raises:
        OptionError: there is none.
    """

    def __init__(self, **candidates: Candidate) -> None:
        if not candidates:
            raise OptionError(
                "a search needs a candidate or more, such as prompt=Candidate(PromptTuning, num_virtual_tokens=[8, 20], "
                "learning_rate=(1e-3, 1e-1))."
            )
        self.candidates = candidates

    def suggest(self, trial: Any) -> Chosen:
        """What a trial tries; asked again, the same."""
        names = list(self.candidates)
        name = names[0] if len(names) == 1 else trial.suggest_categorical(METHOD, names)
        return self.candidates[name].suggest(trial, name)

    def __call__(self, trial: Any) -> dict[str, float]:
        """The arguments of the Trainer that a trial chooses."""
        return {"learning_rate": self.suggest(trial).learning_rate}

    def chosen(self, found: Any) -> Chosen:
        """What was chosen: from the best run of a Trainer's search, a trial of a study, or its parameters.

        Raises:
            OptionError: the parameters are of another space.
        """
        parameters = next(
            (getattr(found, name) for name in ("hyperparameters", "params") if hasattr(found, name)), found
        )
        try:
            return self.suggest(_optuna().trial.FixedTrial(dict(parameters)))
        except (ValueError, KeyError) as error:
            raise OptionError(
                "what was found must be of this space.",
                "Give the space that was searched.",
                found=dict(parameters),
                candidates=", ".join(self.candidates),
            ) from error

    # --- with a Trainer -----------------------------------------------------------------------------------------------

    def callback(self, **options: Any) -> SoftPromptCallback:
        """Make the callback that trains what each trial chooses. Outside of a search it trains what was settled on.

        Args:
            options: as for `SoftPromptCallback`.
        """
        return _Searching(self, **options)

    def settle(self, found: Any, trainer: Any) -> Chosen:
        """Let a Trainer train with what was found from now on: `train()` then repeats that run.

        Args:
            found: as for `chosen`; other arguments that it holds are set too.
            trainer: the Trainer that searched, or another one of the same kind.

        Raises:
            TrainerError: the Trainer has no callback of this space.
        """
        chosen = self.chosen(found)
        own = [one for one in trainer.callback_handler.callbacks if isinstance(one, _Searching) and one.space is self]
        if not own:
            raise TrainerError(
                "a Trainer settles on what its own callback has searched.",
                "Pass `space.callback()` to it in `callbacks=[...]`.",
                callbacks=", ".join(type(one).__name__ for one in trainer.callback_handler.callbacks),
            )
        own[0].settled = chosen.method
        for name, value in getattr(found, "hyperparameters", {}).items():
            if hasattr(trainer.args, name):
                setattr(trainer.args, name, value)
        trainer.args.learning_rate = chosen.learning_rate
        return chosen

    # --- with a study of one's own ------------------------------------------------------------------------------------

    def objective(
        self,
        model: nn.Module,
        train: Callable[[SoftPrompt, float, Callable[[float, int], None]], float],
        *,
        save_to: str | Path | None = None,
        **options: Any,
    ) -> Callable[[Any], float]:
        """Make what `study.optimize` calls.

        Args:
            model: the base of all trials; it does not move.
            train: takes the handle, the learning rate and `report(value, step)`, which also prunes; returns the value.
            save_to: where to keep each trial's prompt, in a folder `trial-<number>`.
            options: as for `attach`.

        Raises:
            TrainerError: in a trial, another one is under way on the same model.
            FrozenModifiedError: in a trial, the base has moved.
        """
        alone = threading.Lock()

        def objective(trial: Any) -> float:
            if not alone.acquire(blocking=False):
                raise TrainerError(_together(trial))
            try:
                method, rate = self.suggest(trial)
                with attach(model, method, **options) as prompt:
                    value = train(prompt, rate, _reporting(trial))
                    prompt.verify_frozen()
                    if save_to is not None:
                        prompt.save_pretrained(Path(save_to) / f"trial-{trial.number}")
                return float(value)
            finally:
                alone.release()

        return objective


class _Searching(SoftPromptCallback):
    """A callback whose method is the trial's."""

    def __init__(self, space: PromptSpace, **options: Any) -> None:
        candidate = next(iter(space.candidates.values()))
        self.space = space
        self.settled = candidate.built({option: values[0] for option, values in candidate.choices.items()})
        self._thread: int | None = None
        super().__init__(self.settled, **options)

    def method_for(self, trial: Any) -> Method:
        """What the trial chooses.

        Raises:
            TrainerError: another thread's trial is under way.
        """
        if trial is None:
            return self.settled
        if self._thread not in (None, threading.get_ident()):
            raise TrainerError(_together(trial))
        self._thread = threading.get_ident()
        return self.space.suggest(trial).method

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trial is over."""
        self._thread = None
        super().on_train_end(args, state, control, **kwargs)


def checkpoint_of(best: Any, args: Any) -> Path:
    """The last checkpoint of a run of a Trainer's search; `softhooks.load` reads it.

    Args:
        best: what `hyperparameter_search` has returned.
        args: the Trainer's arguments.

    Raises:
        CheckpointError: the run has none.
    """
    folder = Path(args.output_dir) / f"run-{best.run_id}"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None:
        raise CheckpointError(
            "a run comes back from a checkpoint that it has saved.",
            "Search with save_strategy='steps' or 'epoch' and without `hp_name`, or train it again after "
            "`space.settle(best, trainer)`.",
            looked_in=folder,
        )
    return Path(last)


def _together(trial: Any) -> str:
    return format_message(
        "the trials of a search share one Trainer or one model, so they follow one another.",
        "Search with n_jobs=1; let several processes share the study's storage instead.",
        trial=f"{trial.number}, while another one is under way",
    )


def _reporting(trial: Any) -> Callable[[float, int], None]:
    """What tells the study how a trial does, and ends the trial if the study says so."""
    pruned = _optuna().TrialPruned

    def report(value: float, step: int) -> None:
        trial.report(value, step)
        if trial.should_prune():
            raise pruned

    return report


def _optuna() -> Any:
    return import_framework("optuna", "Optuna", "optuna")

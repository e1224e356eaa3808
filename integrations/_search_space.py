"""Candidate methods and options for a hyperparameter search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from softhooks.errors import OptionError
from softhooks.method import Method


class Chosen(NamedTuple):
    """The method and the learning rate of one trial."""

    method: Method
    learning_rate: float


class Candidate:
    """A method to search over, with the values to try for its options.

    Args:
        make: a method's class, such as `PromptTuning`, or a function with the same arguments that returns a method.
        num_virtual_tokens: the lengths to choose from.
        learning_rate: the lowest and the highest learning rate; trials sample between them on a logarithmic scale.
        options: for each option of the method, the values to choose from.

    Raises:
        OptionError: an option has no values, or the method does not accept a value.
    """

    def __init__(
        self,
        make: Callable[..., Method],
        *,
        num_virtual_tokens: Sequence[int],
        learning_rate: tuple[float, float],
        **options: Sequence[Any],
    ) -> None:
        self.make = make
        self.learning_rate = learning_rate
        self.choices: dict[str, Sequence[Any]] = {"num_virtual_tokens": num_virtual_tokens, **options}
        low, high = learning_rate
        if not 0 < low <= high:
            raise OptionError(
                f"learning_rate is {learning_rate!r}; it must be a pair (lowest, highest) of numbers above 0."
            )
        for name, values in self.choices.items():
            _check_choices(name, values)
        first = {name: values[0] for name, values in self.choices.items()}
        for name, values in self.choices.items():
            for value in values:
                self.built({**first, name: value})

    def built(self, chosen: Mapping[str, Any]) -> Method:
        options = dict(chosen)
        length = options.pop("num_virtual_tokens")
        try:
            return self.make(length, **options)
        except TypeError as error:
            raise OptionError(
                f"{getattr(self.make, '__name__', self.make)} does not accept the options of the candidate: {error}.",
                "See the documentation of the method for its options.",
                options=", ".join(options) or "none",
            ) from error

    def suggest(self, trial: Any, name: str) -> Chosen:
        """Let an Optuna trial choose the learning rate and a value for each option that has several.

        The parameters of the trial are named `<candidate>.learning_rate` and `<candidate>.<option>`.
        """
        chosen: dict[str, Any] = {}
        for option, values in self.choices.items():
            if len(values) == 1:
                chosen[option] = values[0]
            elif isinstance(values, range):
                low, high = min(values), max(values)
                chosen[option] = trial.suggest_int(f"{name}.{option}", low, high, step=abs(values.step))
            else:
                chosen[option] = trial.suggest_categorical(f"{name}.{option}", list(values))
        rate = trial.suggest_float(f"{name}.learning_rate", *self.learning_rate, log=True)
        return Chosen(self.built(chosen), float(rate))


def _check_choices(name: str, values: Any) -> None:
    several = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    plain = several and (len(values) == 1 or all(isinstance(value, str | int | float | None) for value in values))
    if not plain:
        raise OptionError(
            f"{name}={values!r} is not a list of values to choose from. The list may hold strings, numbers, booleans and None, "
            "or a single value of another type.",
            "Write init=['vocab', 'random'], or layers=[[0, 1]] for a value that is itself a list.",
        )

"""A method to try in a search, with the values that its options may have. Whose trials choose is not known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from softhooks.errors import OptionError
from softhooks.method import Method


class Chosen(NamedTuple):
    """What a trial tries."""

    method: Method
    learning_rate: float


class Candidate:
    """A method to try, with the values of its options.

    Args:
        make: the method, such as `PromptTuning`, or what makes one from a number of virtual tokens and options.
        num_virtual_tokens: the lengths to choose from, or a `range` of them.
        learning_rate: the lowest and the highest, between which a trial draws evenly on a logarithmic scale.
        options: for each option of the method the values to choose from.

    Raises:
        OptionError: there is nothing to choose from, or the method does not take one of the values.
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
                f"learning_rate must be the lowest and the highest, both above 0; it is {learning_rate!r}."
            )
        for name, values in self.choices.items():
            _check_choices(name, values)
        first = {name: values[0] for name, values in self.choices.items()}
        for name, values in self.choices.items():
            for value in values:
                self.built({**first, name: value})

    def built(self, chosen: Mapping[str, Any]) -> Method:
        """Make the method that was chosen."""
        options = dict(chosen)
        length = options.pop("num_virtual_tokens")
        try:
            return self.make(length, **options)
        except TypeError as error:
            raise OptionError(
                "a candidate's options must be options of its method.",
                "Look at the method's documentation.",
                method=getattr(self.make, "__name__", self.make),
                options=", ".join(options) or "none",
                but=error,
            ) from error

    def suggest(self, trial: Any, name: str) -> Chosen:
        """Let a trial choose; the names of its parameters begin with the candidate's.

        What is chosen from one value only is no parameter of the trial.
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
    plain = several and (
        len(values) == 1 or all(isinstance(value, (str, int, float, bool, type(None))) for value in values)
    )
    if not plain:
        raise OptionError(
            "an option's values to choose from are a list of texts, numbers, truth values or None; of anything else there "
            "can be one only.",
            "Write init=['vocab', 'random'], or layers=[[0, 1]] for a value that is a list itself.",
            option=name,
            values=repr(values),
        )

"""The exceptions of softhooks, and checks of options that raise them.

    SoftHooksError
    ├── OptionError (also ValueError)         an option of a method is wrong
    ├── AttachError                           the prompt cannot be attached
    │   ├── NameTakenError                    a prompt of that name is already attached
    │   ├── UnsupportedModelError             the model has nothing to attach to
    │   ├── UnsupportedMethodError            the method does not work on this model
    │   └── PromptTooLongError                the model has too few positions for the prompt
    ├── PromptMismatchError                   the prompt was made for another model or shape
    ├── NotAttachedError                      the model has no such prompt
    ├── PromptNotReachedError                 a forward bypassed the prompt
    ├── UnsupportedModeError                  the prompt does not support this kind of call
    ├── CheckpointError                       a file is missing, truncated, not a prompt, or malicious
    ├── FrozenModifiedError                   a frozen tensor has changed
    └── TrainerError                          the Trainer has a model or an optimizer that cannot be trained correctly

Every message says what was found, the values on both sides, and the remedy.
"""

from __future__ import annotations


def format_message(found: str, /, *remedy: str, **values: object) -> str:
    """Compose a message: what was found, one line for each value, the remedy."""
    width = max((len(name) for name in values), default=0) + 1
    lines = [f"{name.replace('_', ' ') + ':':<{width}} {value}" for name, value in values.items()]
    return "\n".join([found, *lines, *remedy])


class SoftHooksError(Exception):
    """The base class of every error that softhooks raises on purpose.

    Args:
        found: the problem and the rule; a traceback shows this line first.
        remedy: the remedy.
        values: the values that were found and expected, by name; underscores are shown as spaces.
    """

    def __init__(self, found: str, /, *remedy: str, **values: object) -> None:
        super().__init__(format_message(found, *remedy, **values))


class OptionError(SoftHooksError, ValueError):
    """An option of a method is wrong."""


class AttachError(SoftHooksError):
    """The prompt cannot be attached; the model is unchanged."""


class NameTakenError(AttachError):
    """A prompt of that name is already attached."""


class UnsupportedModelError(AttachError):
    """The model has nothing that a prompt could be attached to."""


class UnsupportedMethodError(AttachError):
    """The method does not work on this model."""


class PromptTooLongError(AttachError):
    """The prompt, or prompt and text together, exceed the model's positions.

    Attributes:
        text: the number of text tokens that did not fit in addition to the prompt; None if there was no text.
    """

    text: int | None = None


class PromptMismatchError(SoftHooksError):
    """The prompt was made for another model, or has another shape."""


class NotAttachedError(SoftHooksError):
    """The model has no prompt, or no prompt of this name."""


class PromptNotReachedError(SoftHooksError):
    """A forward bypassed the prompt."""


class UnsupportedModeError(SoftHooksError):
    """The prompt does not support this kind of forward or generation."""


class CheckpointError(SoftHooksError):
    """A prompt's file is missing, truncated, not a prompt, or malicious."""


class FrozenModifiedError(SoftHooksError):
    """A tensor that must stay frozen has changed."""


class TrainerError(SoftHooksError):
    """The Trainer has a model or an optimizer that the callback cannot train correctly."""


# --- checks of options ------------------------------------------------------------------------------------------------


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check an option that takes one of a few words.

    Raises:
        OptionError: the value is not one of the words.
    """
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}; it is {value!r}.")


def check_int(name: str, value: object, minimum: int = 1) -> None:
    """Check an option that takes a whole number.

    Raises:
        OptionError: it is not a whole number, or below the minimum.
    """
    if not is_int(value, minimum):
        raise OptionError(f"{name} must be a whole number of {minimum} or more; it is {value!r}.")


def is_int(value: object, minimum: int) -> bool:
    """Return whether a value is an int, but not a bool, of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_dropout(name: str, value: float) -> None:
    """Check an option that takes a dropout probability.

    Raises:
        OptionError: it is not at least 0 and below 1.
    """
    if not 0.0 <= value < 1.0:
        raise OptionError(f"{name} must be at least 0 and below 1; it is {value}.")

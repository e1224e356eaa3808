"""The exceptions of softhooks, and checks of options."""

from __future__ import annotations

MAX_VIRTUAL_TOKENS = 2**20
"""The largest number of virtual tokens of a prompt, and of slots in a layout."""
MAX_WIDTH = 2**16
"""The largest width of the hidden layers of a prompt's network."""

_MAX_SHOWN = 10_000  # characters


def format_message(found: str, /, *remedy: str, **values: object) -> str:
    """Compose a message: the problem, one line for each value, and the remedy."""
    width = max((len(name) for name in values), default=0) + 1
    lines = [f"{name.replace('_', ' ') + ':':<{width}} {value}" for name, value in values.items()]
    return "\n".join(map(_shown, [found, *lines, *remedy]))


def _shown(text: str) -> str:
    """Shorten a part of a message that is very long, and escape characters that would control a terminal.

    Messages quote names and values from files.
    """
    if len(text) > _MAX_SHOWN:
        text = f"{text[: _MAX_SHOWN // 2]} [{len(text) - _MAX_SHOWN:,} characters left out] {text[-_MAX_SHOWN // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class SoftHooksError(Exception):
    """The base class of all softhooks exceptions.

    Args:
        found: the problem and the rule that is broken; the first line of the message.
        remedy: how to solve the problem; the last lines of the message.
        values: named values, such as those found and expected. The message shows underscores in their names as spaces.
    """

    def __init__(self, found: str, /, *remedy: str, **values: object) -> None:
        super().__init__(format_message(found, *remedy, **values))


class OptionError(SoftHooksError, ValueError):
    """An option has an invalid value."""


class AttachError(SoftHooksError):
    """The prompt cannot be attached; the model is unchanged."""


class NameTakenError(AttachError):
    """A prompt with this name is already attached."""


class UnsupportedModelError(AttachError):
    """No prompt can be attached to this model."""


class UnsupportedMethodError(AttachError):
    """The method does not work on this model."""


class PromptTooLongError(AttachError):
    """The prompt, or the prompt together with the text, is longer than the model's maximum length."""

    text: int | None = None
    """The number of tokens in the text; None if the prompt alone is too long."""


class PromptMismatchError(SoftHooksError):
    """The prompt was made for another model, or its tensors have the wrong shape."""


class NotAttachedError(SoftHooksError):
    """The model has no prompt, or no prompt with this name."""


class PromptNotReachedError(SoftHooksError):
    """A forward pass of the model did not use the prompt."""


class UnsupportedModeError(SoftHooksError):
    """The prompt does not support this kind of forward pass or generation."""


class CheckpointError(SoftHooksError):
    """The file of a saved prompt is missing, truncated or malicious, or contains no prompt."""


class FrozenModifiedError(SoftHooksError):
    """A tensor that must stay frozen has changed."""


class TrainerError(SoftHooksError):
    """The Trainer, or its optimizer, would not train the prompt correctly."""


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise an `OptionError` if an option is not one of the allowed strings."""
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_int(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise an `OptionError` if an option is not an integer of at least `minimum` or, if there is a maximum, is above it."""
    if not is_int(value, minimum):
        raise OptionError(f"{name} is {value!r}; it must be an integer of at least {minimum}.")
    if maximum is not None and is_int(value, maximum + 1):
        raise OptionError(f"{name} is {value!r}; it must be at most {maximum:,}.")


def is_int(value: object, minimum: int) -> bool:
    """Return whether a value is an int (and not a bool) that is at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_dropout(name: str, value: float) -> None:
    """Raise an `OptionError` if a dropout probability is not at least 0 and below 1."""
    if not 0.0 <= value < 1.0:
        raise OptionError(f"{name} is {value}; it must be at least 0 and below 1.")

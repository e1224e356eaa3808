"""The exceptions of softhooks.

    SoftHooksError
    ├── OptionError (also ValueError)         an option of a method is wrong
    ├── AttachError                           the prompt cannot be attached
    │   ├── NameTakenError                    a prompt of that name is there already
    │   ├── UnsupportedModelError             the model has nothing to attach to
    │   ├── UnsupportedMethodError            the method cannot enter this model
    │   └── PromptTooLongError                the model has no positions for it
    ├── PromptMismatchError                   a prompt made for another model or shape
    ├── NotAttachedError                      the model carries no such prompt
    ├── PromptNotReachedError                 a forward went past the prompt
    ├── UnsupportedModeError                  a mode that this way in cannot serve
    ├── CheckpointError                       a file is missing, truncated, foreign or hostile
    ├── FrozenModifiedError                   a frozen tensor has moved
    └── TrainerError                          the Trainer holds what the callback cannot train

Every message states what was found, the values on both sides, and the remedy.
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
        found: what is wrong, and the rule; a traceback shows this line first.
        remedy: what to do about it.
        values: what was found on each side, by name; underscores are shown as spaces.
    """

    def __init__(self, found: str, /, *remedy: str, **values: object) -> None:
        super().__init__(format_message(found, *remedy, **values))


class OptionError(SoftHooksError, ValueError):
    """An option of a method is wrong."""


class AttachError(SoftHooksError):
    """The prompt cannot be attached; the model is as it was."""


class NameTakenError(AttachError):
    """A prompt of that name is attached already."""


class UnsupportedModelError(AttachError):
    """The model has nothing that a prompt could be attached to."""


class UnsupportedMethodError(AttachError):
    """The method cannot enter this model."""


class PromptTooLongError(AttachError):
    """The prompt, or prompt and text together, exceed the model's positions.

    Attributes:
        text: how many tokens of text did not fit beside the prompt, where a text was at hand.
    """

    text: int | None = None


class PromptMismatchError(SoftHooksError):
    """A prompt was made for another model or has another shape."""


class NotAttachedError(SoftHooksError):
    """The model carries no prompt, or none of that name."""


class PromptNotReachedError(SoftHooksError):
    """A forward went by without the prompt."""


class UnsupportedModeError(SoftHooksError):
    """A mode of the forward or of generation that this way in cannot serve."""


class CheckpointError(SoftHooksError):
    """A prompt's file is missing, truncated, foreign or hostile."""


class FrozenModifiedError(SoftHooksError):
    """A tensor that had to stay frozen has moved."""


class TrainerError(SoftHooksError):
    """The Trainer holds a model or an optimizer that the callback cannot train rightly."""

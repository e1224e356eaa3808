"""Select the active prompts of a model: one prompt, one for each row of a batch, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress

from torch import nn

from softhooks.errors import OptionError, UnsupportedModeError
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.prompted_model import PromptedModel, require_prompted_model
from softhooks.runtime.with_blocks import Block


def activate(model: nn.Module, name: str) -> SoftPrompt:
    """Activate one prompt of a model and deactivate all others, in every thread.

    A deactivated prompt keeps its gradients, so that one step can train several prompts; `zero_grad` clears them.

    Raises:
        NotAttachedError: the model has no prompt of this name.
        OptionError: `name` is not a string.
        UnsupportedModeError: another thread is running the model.
    """
    if not isinstance(name, str):
        raise OptionError(
            f"`activate` was given {name!r}; it takes the name of one prompt, for all rows.",
            "To use one prompt for each row, call `softhooks.rows(model, names)`; to combine the outputs of several prompts, "
            "`softhooks.PromptEnsemble(model, names)`; to run the model without a prompt, `softhooks.disabled(model)`.",
            attached=", ".join(map(repr, require_prompted_model(model).prompts)),
        )
    prompted = require_prompted_model(model, name)
    with prompted.running.exclusive("`activate`"):
        prompted.active = name
    return soft_prompts_of(prompted)[name]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without prompts and with its own heads, inside the context. Applies to this thread or asyncio task.

    Raises:
        NotAttachedError: the model has no prompt.
    """
    prompted = require_prompted_model(model)
    try:
        with Block(prompted.model, off=True):
            _show_labels(prompted)
            yield model
    finally:
        _show_labels(prompted)


def _show_labels(prompted: PromptedModel) -> None:
    """Let the config show this thread's label names, unless another thread is running the model."""
    with suppress(UnsupportedModeError), prompted.running.exclusive("a change of label names"):
        prompted.show_labels()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Use one prompt for each row of the batches inside the context, in forward and generate; a row with None uses no prompt.

    Applies to this thread or asyncio task, and to tasks that are started inside.

    Args:
        names: the name of a prompt, or None, for each row. In generate, beams and returned sequences belong to their row.

    Raises:
        NotAttachedError: the model has no prompt of one of the names.
        OptionError: `names` is empty, or is not a list of names and None.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, (str, bytes, Mapping, Set))
    listed = list(names) if is_list else []
    if not listed or not all(name is None or isinstance(name, str) for name in listed):
        raise OptionError(
            f"`rows` was given {names!r}; it takes a list with one entry for each row: the name of a prompt, or None to use "
            "no prompt."
        )
    for name in dict.fromkeys(listed):
        require_prompted_model(model, name)
    with Block(require_prompted_model(model).model, rows=listed):
        yield model

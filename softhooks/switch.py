"""Several prompts on one model: which is on, for the model, for each row, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress

from torch import nn

from softhooks.errors import OptionError, UnsupportedModeError
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.contexts import Block
from softhooks.runtime.prompted_model import PromptedModel, require_prompted_model


def activate(model: nn.Module, name: str) -> SoftPrompt:
    """Turn one prompt on, and the others of the model off, for every thread.

    A prompt that goes off keeps its gradients, so that one step may train several prompts; `zero_grad` clears them as ever.

    Raises:
        NotAttachedError: the model carries no prompt of that name.
        OptionError: it is given something else than one name.
        UnsupportedModeError: another thread runs the model.
    """
    if not isinstance(name, str):
        raise OptionError(
            "`activate` turns one prompt on, for all rows.",
            "For one prompt a row use `softhooks.rows(model, names)`, for several that answer together "
            "`softhooks.PromptEnsemble(model, names)`, for the bare model `softhooks.disabled(model)`.",
            name=repr(name),
            attached=", ".join(map(repr, require_prompted_model(model).prompts)),
        )
    prompted = require_prompted_model(model, name)
    with prompted.running.exclusive("`activate`"):
        prompted.active = name
    return soft_prompts_of(prompted)[name]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the bare model: no prompt, the model's own heads. May be nested; holds in this thread or asyncio task.

    Raises:
        NotAttachedError: the model carries no prompt.
    """
    prompted = require_prompted_model(model)
    try:
        with Block(prompted.model, off=True):
            _show_labels(prompted)
            yield model
    finally:
        _show_labels(prompted)


def _show_labels(prompted: PromptedModel) -> None:
    """Let the config show the names of this thread's labels; while another one runs the model, it shows that one's."""
    with suppress(UnsupportedModeError), prompted.running.exclusive("the names of labels"):
        prompted.show_labels()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Give each row of the batches inside its own prompt, in forward and generate; None gives a row the bare model.

    Holds in this thread or asyncio task, and in tasks that are started inside.

    Args:
        names: one a row; in generate, beams and returned sequences belong to their row.

    Raises:
        NotAttachedError: the model carries no prompt of one of the names.
        OptionError: no row is named.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, (str, bytes, Mapping, Set))
    listed = list(names) if is_list else []
    if not listed or not all(name is None or isinstance(name, str) for name in listed):
        raise OptionError(f"rows must be a list of one prompt name a row, or None; it is {names!r}.")
    for name in dict.fromkeys(listed):
        require_prompted_model(model, name)
    with Block(require_prompted_model(model).model, rows=listed):
        yield model

"""Several prompts on one model: which is on, for the model, for each row, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from softhooks.errors import OptionError
from softhooks.prompt import SoftPrompt, require_host


def activate(model: nn.Module, name: str) -> SoftPrompt:
    """Turn one prompt on, and the others of the model off.

    Raises:
        NotAttachedError: the model carries no prompt of that name.
    """
    host = require_host(model, name)
    host.active = name
    return host.prompts[name]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the bare model: no prompt, the model's own heads. May be nested.

    Raises:
        NotAttachedError: the model carries no prompt.
    """
    host = require_host(model)
    host.disabled += 1
    try:
        yield model
    finally:
        host.disabled -= 1


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Give each row of the batches inside its own prompt, in forward and generate; None gives a row the bare model.

    Args:
        names: one a row; beams and returned sequences belong to their row.

    Raises:
        NotAttachedError: the model carries no prompt of one of the names.
        OptionError: no row is named.
    """
    if isinstance(names, str) or not len(names):
        raise OptionError(f"rows must be a list of one prompt name a row; it is {names!r}.")
    for name in dict.fromkeys(names):
        require_host(model, name)
    host = require_host(model)
    before, host.rows = host.rows, list(names)
    try:
        yield model
    finally:
        host.rows = before

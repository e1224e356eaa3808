"""Several prompts on one model: which is on, for the model, for each row, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from torch import nn

from softhooks.errors import OptionError, explain
from softhooks.generation import Noting
from softhooks.host import Host
from softhooks.probe import unwrapped
from softhooks.prompt import SoftPrompt, require_host


def activate(model: nn.Module, name: str) -> SoftPrompt:
    """Turn one prompt on, and the others of the model off.

    A prompt that goes off keeps its gradients, so that one step may train several prompts; `zero_grad` clears them as ever.

    Raises:
        NotAttachedError: the model carries no prompt of that name.
        OptionError: it is given something else than one name.
    """
    if not isinstance(name, str):
        raise OptionError(
            explain(
                "`activate` turns one prompt on, for all rows.",
                "For one prompt a row use `softhooks.rows(model, names)`, for several that answer together "
                "`softhooks.PromptEnsemble(model, names)`, for the bare model `softhooks.disabled(model)`.",
                name=repr(name),
                attached=", ".join(map(repr, require_host(model).prompts)),
            )
        )
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
    host.labels.show()
    try:
        yield model
    finally:
        host.disabled -= 1
        host.labels.show()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Give each row of the batches inside its own prompt, in forward and generate; None gives a row the bare model.

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
        require_host(model, name)
    host = require_host(model)
    before, host.rows = host.rows, listed
    try:
        with _noting_repeats(host):
            yield model
    finally:
        host.rows = before


@contextmanager
def _noting_repeats(host: Host) -> Iterator[None]:
    """Note how often `generate` repeats each row, while it runs; any other batch must have the rows that were named."""
    model = unwrapped(host.model)
    if not hasattr(model, "_expand_inputs_for_generation"):
        yield
        return
    generate, expand = model.generate, model._expand_inputs_for_generation

    def noting_generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            host.repeats = 1

    def noting_expand(expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        host.repeats = expand_size
        return expand(expand_size, *args, **kwargs)  # type: ignore[operator]

    noting = {"generate": noting_generate, "_expand_inputs_for_generation": noting_expand}
    absent = object()
    before = {name: model.__dict__.get(name, absent) for name in noting}
    model.__dict__.update(noting)
    try:
        yield
    finally:
        for name, value in before.items():
            if isinstance(value, Noting) and not host.prompts:  # the last prompt was removed inside
                value = absent if value.before is None else value.before
            if value is absent:
                model.__dict__.pop(name, None)
            else:
                model.__dict__[name] = value

"""The method of a saved prompt: find its class by kind, and check the options, conventions and tables of the file."""

from __future__ import annotations

import dataclasses
from typing import Any

from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.errors import CheckpointError, SoftHooksError
from softhooks.formats.stored import StoredPrompt
from softhooks.method import METHODS, Method


def method_of(stored: StoredPrompt) -> Method:
    """Make the method of a saved prompt, without the options that only concern the initialization."""
    kind, source = stored.kind, stored.source
    if kind not in METHODS:
        raise CheckpointError(f"{source} has the method {kind!r}, which is not one of {sorted(METHODS)}.")
    cls = METHODS[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(stored.options) - set(fields))
    if unknown:
        raise CheckpointError(
            f"{source} has options of {kind} that this version of softhooks does not know: {unknown}. Upgrade softhooks."
        )
    options = {
        key: value for key, value in stored.options.items() if fields[key].compare and key not in cls.init_options
    }
    for key, value in options.items():
        _check_type(fields[key], value, source)
    try:
        method = cls(**options)
    except (SoftHooksError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} has invalid options for {kind}: {error}") from error
    method.check_tables(stored.tables, source)
    _check_conventions(stored.conventions, method, source)
    return method


def _check_type(field: dataclasses.Field[Any], value: object, source: str) -> None:
    """Check that a value has the type of its option's default; an int may stand for a float."""
    default = field.default
    if not isinstance(default, (bool, int, float, str)) or (value is None and str(field.type).endswith("| None")):
        return
    is_like = type(value) in (int, float) if isinstance(default, float) else type(value) is type(default)
    if not is_like:
        raise CheckpointError(f"{source} has {field.name}={value!r}, where a {type(default).__name__} is expected.")


def _check_conventions(conventions: dict[str, Any], method: Method, source: str) -> None:
    """Check the conventions of a file against its method and options."""
    allowed = {key: _allowed(method, key, values) for key, values in method.conventions_allowed.items()}
    if "placement" in allowed:
        allowed["placement"] = (method.token_layout.placement,)
    found = {key: value for key, value in conventions.items() if key != BUFFER}
    if set(found) != set(allowed) or not all(found[key] in allowed[key] for key in allowed):
        raise CheckpointError(
            f"the conventions in {source} do not match {method.kind} with its options.",
            "If a newer version of softhooks wrote the file, upgrade softhooks.",
            expected={key: list(values) for key, values in allowed.items()},
            found=conventions,
        )
    if BUFFER not in conventions:
        return
    ids, count = conventions[BUFFER], method.num_virtual_tokens
    are_ids = isinstance(ids, list) and len(ids) == count and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not are_ids or method.enters != "embeddings":
        raise CheckpointError(
            f"{source} does not have one id for each virtual token that is an embedding row.",
            "Save the prompt again.",
            expected=f"{count} ids" if method.enters == "embeddings" else "none",
            found=str(ids)[:80],
        )


def _allowed(method: Method, key: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values of a convention that the options allow; an option that is None allows all of them."""
    option = getattr(method, key, None)
    return (option,) if option in values else values

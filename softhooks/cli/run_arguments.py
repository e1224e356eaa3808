"""Create the method and collect the options of the callback from a command line or a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from softhooks.cli.options import Option, callback_options, method_options, methods
from softhooks.cli.run_parser import (
    DEFAULT_METHOD,
    DEFAULT_TOKENS,
    CommandLine,
    check_config,
    method_kind,
    read_config,
    unknown_option,
)
from softhooks.errors import OptionError
from softhooks.method import Method
from softhooks.methods import METHODS


def resolve_line(line: CommandLine) -> tuple[Method, dict[str, Any]]:
    """Read the method and the options of the callback from a command line and its configuration file."""
    config = read_config(line.config)
    if not line.program:
        raise OptionError(
            "`softhooks run` was called without a script or `-m MODULE`. `softhooks run --help` shows examples."
        )
    script = Path(line.program[0])
    if not line.is_module and not script.is_file():
        found = "it is a directory" if script.is_dir() else "there is no such file"
        raise OptionError(
            f"{str(script)!r} is not a script: {found}.",
            "Put the options of `softhooks run` before the script; run modules with `-m`.",
            looked_in=Path.cwd(),
        )
    return _resolve(line.method or config["method"], config, line.options)


def resolve(
    name: str | None, file: Path | None, given: Mapping[str, bool | list[str]], *, tokenizer: str
) -> tuple[Method, dict[str, Any]]:
    """Read the method and the options of the callback for `softhooks train`.

    Args:
        name: the name of the method, or None for that of the file or the default.
        file: a configuration file.
        given: the options from the command line.
        tokenizer: the tokenizer for methods that take one, unless another is given.
    """
    config = read_config(None if file is None else str(file))
    chosen = name or config["method"] or DEFAULT_METHOD
    if "tokenizer" in method_options(method_kind(chosen)):
        config["options"] = {"tokenizer": tokenizer, **config["options"]}
    return _resolve(chosen, config, given)


def from_sections(found: Any, source: str) -> tuple[Method, dict[str, Any]]:
    """Read the method and the options of the callback from a configuration.

    Args:
        found: the configuration, with the sections `method`, `options` and `callback`.
        source: where the configuration comes from, for error messages.

    Raises:
        OptionError: a section or an option is unknown, a required option is missing, or a value is invalid.
    """
    config = check_config(found, source)
    return _resolve(config["method"], config, {})


def _resolve(
    name: str | None, config: Mapping[str, Any], given: Mapping[str, bool | list[str]]
) -> tuple[Method, dict[str, Any]]:
    """Create the method and collect the options of the callback; `given`, from the command line, takes precedence."""
    kind = method_kind(name or DEFAULT_METHOD)
    options, callback = method_options(kind), callback_options()
    of_method = {name: value for name, value in given.items() if name not in callback}
    of_callback = {name: value for name, value in given.items() if name in callback}
    values = _values(config["options"], of_method, options, kind)
    if options["num_virtual_tokens"].default is None:
        values.setdefault("num_virtual_tokens", DEFAULT_TOKENS)
    for option in options.values():
        if option.default is None and option.name not in values:
            raise OptionError(
                f"{kind} needs {option.flag}, which is missing.", f"Its value is {option.takes}: {option.about}"
            )
    return METHODS[kind](**values), _values(config["callback"], of_callback, callback, "the callback")


def _values(
    config: Mapping[str, Any], given: Mapping[str, bool | list[str]], options: Mapping[str, Option], owner: str
) -> dict[str, Any]:
    """Convert the options from a configuration file and the command line; the command line takes precedence."""
    _check_names((*config, *given), options, owner)
    texts = {name: _text(value, options[name]) if isinstance(value, list) else value for name, value in given.items()}
    return {name: options[name].read(value) for name, value in {**config, **texts}.items()}


def _text(texts: list[str], option: Option) -> str | list[str]:
    """Return all strings given for an option if it takes a list and was repeated; otherwise, return the last one."""
    return texts if len(texts) > 1 and (option.hint is Any or "list" in option.takes) else texts[-1]


def _check_names(given: Iterable[str], options: Mapping[str, Option], owner: str) -> None:
    """Raise an `OptionError` if `owner` (a method or the callback) does not have one of the given options."""
    for name in given:
        if name in options:
            continue
        others = [kind for kind in methods() if name in method_options(kind)]
        if others:
            raise OptionError(
                f"{name} is not an option of {owner}.",
                f"Leave it out, or name the method: `--method {others[0]}`.",
                belongs_to=", ".join(others),
            )
        raise unknown_option(name, options)

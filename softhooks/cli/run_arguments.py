"""The arguments of `softhooks run`: script or module, method, and options of the callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softhooks.cli import run_config, run_parser
from softhooks.cli.options import Option, callback_options, method_options, methods
from softhooks.cli.run_parser import (
    DEFAULT_METHOD,
    DEFAULT_TOKENS,
    CommandLine,
    method_kind,
    unknown_option,
)
from softhooks.errors import OptionError
from softhooks.method import Method
from softhooks.methods import METHODS


@dataclass(frozen=True)
class Request:
    """The script or module to run, and the prompt to train.

    Attributes:
        method: the method with its options.
        callback: the options of the callback.
        script: the path of the script, or the name of the module.
        arguments: the arguments of the script or module.
        is_module: whether to run a module, as `python -m` does.
    """

    method: Method
    callback: dict[str, Any]
    script: Path | str
    arguments: list[str]
    is_module: bool = False


def parse(arguments: list[str]) -> Request:
    """Parse a command line and read the configuration file that it names.

    Raises:
        OptionError: an option, its value or the script is wrong.
    """
    return request(run_parser.read(arguments))


def request(line: CommandLine) -> Request:
    """Create the method and collect the options of the callback.

    Raises:
        OptionError: an option, its value or the script is wrong.
    """
    config = run_config.read(line.config)
    if not line.program:
        raise OptionError(
            "`softhooks run` was called without a script or `-m MODULE`. `softhooks run --help` shows examples."
        )
    script: Path | str = line.program[0] if line.is_module else Path(line.program[0])
    if isinstance(script, Path) and not script.is_file():
        found = "a directory" if script.is_dir() else "no such file"
        raise OptionError(
            f"{str(script)!r} is not a script: {found}.",
            "Options of `softhooks run` go before the script; modules are run with `-m`.",
            looked_in=Path.cwd(),
        )
    method, callback = resolve(line.method or config["method"], config, line.options)
    return Request(method, callback, script, line.program[1:], line.is_module)


def from_sections(found: Any, source: str) -> tuple[Method, dict[str, Any]]:
    """Read the method and the options of the callback from the sections of a configuration.

    Args:
        found: the sections `method`, `options` and `callback`.
        source: the source of the sections, for error messages.

    Raises:
        OptionError: a section is unknown, or a value does not fit.
    """
    config = run_config.sections(found, source)
    return resolve(config["method"], config, {})


def resolve(
    name: str | None, config: Mapping[str, Any], given: Mapping[str, bool | list[str]]
) -> tuple[Method, dict[str, Any]]:
    """Create the method and collect the options of the callback; the command line takes precedence.

    Args:
        name: the name of the method, or None for the default method.
        config: the sections of the configuration.
        given: the options of the command line.

    Raises:
        OptionError: an option is unknown or missing, or its value does not fit.
    """
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
                f"{kind} needs {option.flag}, which is not given.", f"It takes {option.takes}: {option.about}"
            )
    return METHODS[kind](**values), _values(config["callback"], of_callback, callback, "the callback")


def _values(
    config: Mapping[str, Any], given: Mapping[str, bool | list[str]], options: Mapping[str, Option], owner: str
) -> dict[str, Any]:
    """Convert the values from a file and from the command line, which takes precedence."""
    _check_names((*config, *given), options, owner)
    texts = {name: _text(value, options[name]) if isinstance(value, list) else value for name, value in given.items()}
    return {name: options[name].read(value) for name, value in {**config, **texts}.items()}


def _text(texts: list[str], option: Option) -> str | list[str]:
    """Return all texts of a repeated option that takes a list, or the last text of any other option."""
    return texts if len(texts) > 1 and (option.hint is Any or "list" in option.takes) else texts[-1]


def _check_names(given: Iterable[str], options: Mapping[str, Option], owner: str) -> None:
    """Check that every given option belongs to the method or to the callback.

    Raises:
        OptionError: an option does not; the error names the methods that have this option, or similar names.
    """
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

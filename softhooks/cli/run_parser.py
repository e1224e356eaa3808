"""Parse the command line and configuration file of `softhooks run`, without importing torch, to show help and errors quickly."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softhooks.cli.option_types import NO, YES
from softhooks.cli.options import callback_options, method_options, methods
from softhooks.errors import OptionError

DEFAULT_METHOD = "prompt_tuning"
DEFAULT_TOKENS = 20
_SECTIONS: dict[str, type] = {"method": str, "options": dict, "callback": dict}


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        options: the options of the method and of the callback by name: True or False for a switch, and the list of given
            strings for any other option.
        program: the script or module and its arguments; may be empty.
        is_module: whether `program` was given with `-m`.
    """

    options: dict[str, bool | list[str]]
    program: list[str]
    is_module: bool = False
    method: str | None = None
    config: str | None = None
    help: bool = False


def read(arguments: list[str]) -> CommandLine:
    """Parse a command line."""
    module = next((index for index, word in enumerate(arguments) if word.startswith("-m")), len(arguments))
    given = _parse(arguments[:module])  # `-m` after the name of a script belongs to the script
    is_module = module < len(arguments) and not given["program"]
    if is_module:
        name = arguments[module].removeprefix("-m")
        given["program"] = [name, *arguments[module + 1 :]] if name else arguments[module + 1 :]
    else:
        given = _parse(arguments)
    program = given.pop("program")
    own = {name: given.pop(name) for name in ("method", "config", "help") if name in given}
    return CommandLine(given, program[1:] if program[:1] == ["--"] else program, is_module, **own)


def method_options_in(arguments: list[str]) -> tuple[dict[str, bool | list[str]], list[str]]:
    """Return the options of the methods and of the callback by name, as in `CommandLine`, and all other arguments in order."""
    parser = _empty_parser()
    _add_method_options(parser)
    given, rest = _parsed(parser, arguments)
    return given, rest


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Parse the options; the first word that is not an option starts `program`."""
    given, unknown = _parsed(_parser(), arguments)
    if unknown:
        raise unknown_option(unknown[0].partition("=")[0], (*_switches(), "method", "config", "help"))
    return given


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options that a parser knows, and the remaining arguments."""
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        flag = str(error.argument_name).split("/")[0]
        if "expected one argument" in error.message:
            raise OptionError(
                f"{flag} is given without a value.",
                f"Write `{flag} VALUE`, or `{flag}=VALUE` if the value begins with a hyphen.",
            ) from None
        raise OptionError(
            f"{flag} takes no value, but {error.message.rpartition('argument ')[2]} was given.",
            f"Write `{flag}`, or `--no-{flag[2:]}`.",
        ) from None
    return vars(given), unknown


def _parser() -> argparse.ArgumentParser:
    parser = _empty_parser()
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--method")
    parser.add_argument("--config")
    _add_method_options(parser)
    parser.add_argument("program", nargs=argparse.PARSER, default=[]).required = False
    return parser


def _empty_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all methods and of the callback."""
    for name, is_switch in _switches().items():
        flags = dict.fromkeys(("--" + name.replace("_", "-"), "--" + name))
        if not is_switch:
            parser.add_argument(*flags, dest=name, action="append")
            continue
        parser.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--no_{name}", dest=name, action="store_false")
        for words, action in ((YES, "store_true"), (NO, "store_false")):  # BooleanOptionalAction refuses `=yes`
            spellings = {f"{flag}={word}" for flag in flags for text in words for word in (text, text.title())}
            parser.add_argument(*spellings, dest=name, action=action)


def _switches() -> dict[str, bool]:
    """Map the name of each option to whether it is a switch in the callback and in every method that has it."""
    found: dict[str, bool] = {}
    for options in (*map(method_options, methods()), callback_options()):
        for name, option in options.items():
            found[name] = option.is_switch and found.get(name, True)
    return found


def method_kind(name: Any) -> str:
    """Return the `kind` of a method: `prefix_tuning` for `prefix-tuning`, `PrefixTuning` or `prefix_tuning`."""
    for kind in methods():
        if kind.replace("_", "") == str(name).replace("-", "").replace("_", "").lower():
            return kind
    raise OptionError(
        f"softhooks has no method {str(name)!r}.",
        suggestion(str(name), methods(), "{}", cutoff=0.5) or "`softhooks run --help` describes the methods.",
        methods=", ".join(kind.replace("_", "-") for kind in methods()),
    )


def unknown_option(name: str, known: Iterable[str]) -> OptionError:
    """Return an error that names an unknown option and suggests options with similar names."""
    return OptionError(
        f"{name} is not an option of the method, of the callback or of `softhooks run`.",
        (suggestion(name, known, "--{}") or "Put the options of the script after the script.")
        + " `softhooks run --help` lists all options.",
    )


def suggestion(name: str, known: Iterable[str], form: str, cutoff: float = 0.6) -> str:
    """Return a question "Did you mean ...?" with the most similar names, or an empty string if no name is similar.

    Args:
        name: the unknown name.
        known: the names to suggest.
        form: how to write a suggested name.
        cutoff: how similar a suggested name must be, from 0 (not at all) to 1 (equal).
    """
    plain = name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(plain, list(known), n=3, cutoff=cutoff)
    return f"Did you mean {' or '.join(form.format(n.replace('_', '-')) for n in near)}?" if near else ""


# --- the configuration file -------------------------------------------------------------------------------------------


def read_config(file: str | None) -> dict[str, Any]:
    """Read a configuration file; without a file, return an empty configuration."""
    if file is None:
        return check_config({}, "")
    path = Path(file)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # an invalid date is a ValueError
        raise OptionError(
            f"{path} cannot be read as a YAML or JSON file.",
            "Give a YAML or JSON file with the sections `method:` and `options:`.",
            cause=" ".join(str(error).split()),
        ) from error
    return check_config(found, str(path))


def check_config(found: Any, source: str) -> dict[str, Any]:
    """Check a configuration, add missing sections, and convert hyphens in the names of options to underscores."""
    config: dict[str, Any] = {"method": None, "options": {}, "callback": {}}
    pairs: Iterable[tuple[Any, Any]] = found.items() if isinstance(found, dict) else [("", found)]
    for name, value in pairs:
        if not isinstance(value, _SECTIONS.get(name, ())):
            shown = f"{name}: {value!r}" if name else repr(found)
            raise OptionError(
                f"a configuration of `softhooks run` cannot contain {shown}.",
                suggestion(str(name), _SECTIONS, "{}:")
                or "Write `method: prompt_tuning`, then `options:`, and below it each option on its own line.",
                file=source,
                sections="method (a name), options (values by name), callback (values by name)",
            )
        config[name] = {str(k).replace("-", "_"): v for k, v in value.items()} if isinstance(value, dict) else value
    return config

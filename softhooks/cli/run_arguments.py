"""What `softhooks run` is asked for: its command line and its configuration file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softhooks.attach import attach
from softhooks.cli.options import REQUIRED, Option, argument_options, method_options
from softhooks.errors import OptionError
from softhooks.method import Method
from softhooks.methods import METHODS
from softhooks.trainer.callback import SoftPromptCallback

DEFAULT_METHOD = "prompt_tuning"
DEFAULT_TOKENS = 20
_OWN = ("method", "config", "help")
_SECTIONS = ("method", "options", "callback")


@dataclass(frozen=True)
class Help:
    """To explain, not to run.

    Attributes:
        kind: the method that was named.
    """

    kind: str | None


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        method: the method with its options.
        callback: the options of the callback.
        script: the file to run, or the name of the module.
        arguments: what it gets.
        is_module: whether it is a module, as `python -m` runs one.
    """

    method: Method
    callback: dict[str, Any]
    script: Path | str
    arguments: list[str]
    is_module: bool = False


class Texts(list[str]):
    """What a command line gave for one option, each time that it was named."""


def callback_options() -> dict[str, Option]:
    """The options of the callback that a text can give."""
    options = argument_options(SoftPromptCallback.__init__, SoftPromptCallback.__doc__, attach.__doc__)
    return {name: option for name, option in options.items() if option.takes}


def parse(arguments: list[str]) -> Request | Help:
    """Read a command line: options up to the script, everything behind it for the script.

    Raises:
        OptionError: it cannot be understood, or its values do not fit.
    """
    given, rest = _split(arguments)
    config = _configuration(given.pop("config", None))
    named = given.pop("method", config["method"])
    kind = None if named is None else _kind(named[-1] if isinstance(named, Texts) else named)
    if "help" in given:
        return Help(kind)
    if not rest:
        raise OptionError(
            "`softhooks run` needs a script or `-m MODULE` to run; none is named. `softhooks run --help` shows examples."
        )
    is_module = "m" in given
    script: Path | str = rest[0] if is_module else Path(rest[0])
    if isinstance(script, Path) and not script.is_file():
        raise OptionError(
            "the script to run must be a file.",
            "Options of `softhooks run` stand before the script; a module is run with `-m`.",
            script=repr(rest[0]),
            found="a directory" if script.is_dir() else "no such file",
        )
    given.pop("m", None)
    method, callback = resolve(kind, config, given)
    return Request(method, callback, script, rest[1:], is_module)


def from_sections(found: Any, source: str) -> tuple[Method, dict[str, Any]]:
    """Read a method and the options of the callback from what a configuration holds: `method`, `options`, `callback`.

    Raises:
        OptionError: it holds something else, or its values do not fit.
    """
    config = _sections(found, source)
    return resolve(None if config["method"] is None else _kind(config["method"]), config, {})


def resolve(kind: str | None, config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Make the method and the options of the callback from a configuration, and from what a command line gives above it.

    Raises:
        OptionError: an option belongs elsewhere, is missing, or its value does not fit.
    """
    kind = kind or DEFAULT_METHOD
    options, callback = method_options(METHODS[kind]), callback_options()
    asked = {**config["options"], **{name: value for name, value in given.items() if name not in callback}}
    told = {**config["callback"], **{name: value for name, value in given.items() if name in callback}}
    _check_names(asked, options, kind)
    _check_names(told, callback, "the callback")
    values = {name: options[name].read(_single(value, options[name])) for name, value in asked.items()}
    if options["num_virtual_tokens"].default is REQUIRED:
        values.setdefault("num_virtual_tokens", DEFAULT_TOKENS)
    for name, option in options.items():
        if option.default is REQUIRED and name not in values:
            raise OptionError(f"{kind} needs {option.flag}: {option.about} It takes {option.takes}.")
    method = METHODS[kind](**values)
    return method, {name: callback[name].read(_single(value, callback[name])) for name, value in told.items()}


# --- the command line -------------------------------------------------------------------------------------------------


def _split(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the options off the front: texts in order of appearance, or True and False for switches."""
    switches = _switches()
    known = {*switches, *_OWN}
    given: dict[str, Any] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        if rest[0].startswith("-m"):  # as for Python: nothing behind the module is for us
            module = rest.pop(0).removeprefix("-m")
            return given | {"m": True}, [module, *rest] if module else rest
        word, has_value, value = rest.pop(0).partition("=")
        name = {"-h": "help"}.get(word, word.removeprefix("--").replace("-", "_"))
        positive = name not in known and name.startswith("no_") and switches.get(name.removeprefix("no_"), False)
        name = name.removeprefix("no_") if positive else name
        if name not in known or not (word.startswith("--") or word == "-h"):
            raise _unknown(word, known)
        if name == "help":
            given[name] = True
        elif switches.get(name, False) and not has_value:
            given[name] = not positive
        elif not has_value and not rest:
            raise OptionError(f"{word} needs a value; the command line ends behind it.")
        else:
            before = given.get(name)
            given[name] = Texts([*(before if isinstance(before, Texts) else ()), value if has_value else rest.pop(0)])
    return given, rest[1:] if rest[:1] == ["--"] else rest


def _switches() -> dict[str, bool]:
    """Every option of every method and of the callback, and whether it stands without a value."""
    found: dict[str, bool] = {}
    for options in (*map(method_options, METHODS.values()), callback_options()):
        for name, option in options.items():
            found[name] = option.is_switch and found.get(name, True)
    return found


def _single(value: Any, option: Option) -> Any:
    """Several texts are a list where the option takes one; elsewhere the last counts."""
    if not isinstance(value, Texts):
        return value
    return list(value) if len(value) > 1 and (option.hint is Any or "list" in option.takes) else value[-1]


def _kind(name: Any) -> str:
    plain = str(name).replace("-", "").replace("_", "").lower()
    for kind, method in METHODS.items():
        if plain in (kind.replace("_", ""), method.__name__.lower()):
            return kind
    raise OptionError(
        "a method must be one of those that softhooks has.",
        _suggestion(str(name).replace("-", "_"), METHODS, "{}") or "`softhooks run --help` describes them.",
        asked=repr(name),
        methods=", ".join(METHODS),
    )


def _check_names(given: Iterable[str], options: Mapping[str, Option], owner: str) -> None:
    """Check that every option that was given belongs to its owner.

    Raises:
        OptionError: naming the methods that it belongs to, or the nearest names.
    """
    for name in given:
        if name in options:
            continue
        others = [kind for kind, method in METHODS.items() if name in method_options(method)]
        if others:
            raise OptionError(
                "an option belongs to its method.",
                f"Leave it out, or name the method: `--method {others[0]}`.",
                option=name,
                belongs_to=", ".join(others),
                asked=owner,
            )
        raise _unknown(name, options)


def _unknown(name: str, known: Iterable[str]) -> OptionError:
    plain = name.lstrip("-").replace("-", "_")
    return OptionError(
        "an option must be one of the method's, of the callback's, or of `softhooks run`.",
        (_suggestion(plain, known, "--{}") or "Options of the script stand behind the script.")
        + " `softhooks run --help` lists all.",
        unknown=name,
    )


def _suggestion(name: str, known: Iterable[str], form: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(form.format(n.replace('_', '-')) for n in near)}?" if near else ""


# --- the file ---------------------------------------------------------------------------------------------------------


def _configuration(paths: list[str] | None) -> dict[str, Any]:
    """Read a YAML or JSON file with a method, its options and the callback's.

    Raises:
        OptionError: there is no such file, or it holds something else.
    """
    if paths is None:
        return _sections({}, "")
    path = Path(paths[-1])
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(
            "a configuration must be a YAML or JSON file.",
            "Name one that holds `method:` and `options:`.",
            file=path,
            cause=" ".join(str(error).split()),
        ) from error
    return _sections(found, str(path))


def _sections(found: Any, source: str) -> dict[str, Any]:
    """Check the sections of a configuration, and spell the options as Python does."""
    empty: dict[str, Any] = {"method": None, "options": {}, "callback": {}}
    sections = found if isinstance(found, dict) else {"": found}
    for name, value in sections.items():
        wanted = str if name == "method" else dict
        if name not in _SECTIONS or not isinstance(value, wanted):
            suggestion = _suggestion(str(name), _SECTIONS, "{}:")
            raise OptionError(
                "a configuration holds a method's name, its options by name, and options of the callback by name.",
                suggestion or "Write `method: prompt_tuning`, and `options:` with one option a line below it.",
                file=source,
                found=f"{name}: {value!r}" if name else repr(found),
                sections=", ".join(_SECTIONS),
            )
    spelled = {
        name: {str(key).replace("-", "_"): value for key, value in section.items()} if name != "method" else section
        for name, section in sections.items()
    }
    return {**empty, **spelled}

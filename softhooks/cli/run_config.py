"""Read the configuration file of `softhooks run`, without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from softhooks.cli.run_parser import suggestion
from softhooks.errors import OptionError

_SECTIONS: dict[str, type] = {"method": str, "options": dict, "callback": dict}


def read(file: str | None) -> dict[str, Any]:
    """Read a configuration file; without a file, return an empty configuration."""
    if file is None:
        return sections({}, "")
    path = Path(file)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(
            f"{path} cannot be read as a YAML or JSON file.",
            "Give a YAML or JSON file with the sections `method:` and `options:`.",
            cause=" ".join(str(error).split()),
        ) from error
    return sections(found, str(path))


def sections(found: Any, source: str) -> dict[str, Any]:
    """Check a configuration, and convert hyphens in the names of options to underscores.

    Returns:
        `method` (a name or None), `options` and `callback` (values by name).
    """
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

"""The options of `softhooks run` as a JSON table, for a parser and a help that do not import torch.

`make options` generates `option_table.json` from the methods and the callback; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softhooks.cli.options import Option

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Row:
    """One option, in words.

    Attributes:
        name: its Python name.
        takes: the values it takes; empty if only Python code can give it.
        is_switch: whether it is given as `--name` or `--no-name`, without a value.
        default: its default; None if it has none or the default is to do nothing.
        about: its description.
    """

    name: str
    takes: str
    is_switch: bool
    default: str | None
    about: str

    @property
    def flag(self) -> str:
        """The option on a command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Table:
    """All options.

    Attributes:
        callback: the options of the callback.
        methods: the options of each method, by its `kind`.
        summaries: the first sentence of each method's docstring, by its `kind`.
    """

    callback: tuple[Row, ...]
    methods: dict[str, tuple[Row, ...]]
    summaries: dict[str, str]

    def switches(self) -> dict[str, bool]:
        """Every option by name, and whether it is a switch wherever it occurs."""
        found: dict[str, bool] = {}
        for row in (*(row for rows in self.methods.values() for row in rows), *self.callback):
            found[row.name] = row.is_switch and found.get(row.name, True)
        return found


@cache
def load() -> Table:
    """Read the table."""
    stored = json.loads(FILE.read_text())
    rows = {owner: tuple(Row(**row) for row in stored[owner]) for owner in ("callback", *stored["summaries"])}
    return Table(rows.pop("callback"), rows, stored["summaries"])


def generate() -> Table:
    """Make the table from the classes."""
    from softhooks.cli.options import method_options, summary
    from softhooks.cli.run_arguments import callback_options
    from softhooks.methods import METHODS

    return Table(
        _rows(callback_options().values()),
        {kind: _rows(method_options(method).values()) for kind, method in METHODS.items()},
        {kind: summary(method) for kind, method in METHODS.items()},
    )


def _rows(options: Iterable[Option]) -> tuple[Row, ...]:
    return tuple(
        Row(
            option.name,
            option.takes,
            option.is_switch,
            None if option.is_required or option.default in (None, ()) else str(option.default),
            option.about,
        )
        for option in options
    )


def main() -> None:
    """Write the table, each option on a line of its own."""
    table = asdict(generate())
    rows = {"callback": table.pop("callback"), **table.pop("methods")}
    written = [f"{json.dumps(owner)}: [\n" + ",\n".join(map(json.dumps, rows[owner])) + "\n]" for owner in rows]
    FILE.write_text(f'{{"summaries": {json.dumps(table["summaries"], indent=0)},\n' + ",\n".join(written) + "}\n")


if __name__ == "__main__":
    main()

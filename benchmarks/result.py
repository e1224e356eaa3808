"""The result of a benchmark: rows, columns, targets, and the environment in which it was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import machine, versions
from benchmarks.profiles import Profile

PARITY = 0.05
"""The tolerance of a bound of exactly 1; see `Target`."""


@dataclass(frozen=True)
class Target:
    """A figure that must hold.

    No measurement can distinguish "never slower", a bound of exactly 1, from "as fast". That bound is missed if the whole 95%
    interval lies below it, or the figure itself by more than `PARITY`. Every other bound is exact.

    Attributes:
        name: what is measured.
        value: the figure.
        relation: on which side of the bound it must be.
        bound: the bound.
        high: the upper end of the figure's 95% interval, where it has one.
    """

    name: str
    value: float
    relation: Literal["at least", "at most"]
    bound: float
    high: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the figure is within the bound."""
        if self.relation == "at most":
            return self.value <= self.bound
        if self.bound == 1.0 and self.high is not None:
            return self.high >= self.bound and self.value >= self.bound - PARITY
        return self.value >= self.bound

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g}, must be {self.relation} {self.bound:g}"


@dataclass(frozen=True)
class Column:
    """A column of the table: its header, and how a row fills it."""

    header: str
    template: str

    def of(self, row: dict[str, Any]) -> str:
        """Format one row; empty if the row lacks the figure."""
        try:
            return self.template.format_map(row)
        except KeyError:
            return ""


@dataclass(frozen=True)
class Result:
    """One benchmark's figures.

    Attributes:
        name: of the file.
        title: of the table.
        explanation: what the figures mean, in a sentence or two.
        columns: how the table is made of the rows.
        rows: the figures.
        targets: those that must hold.
        settings: the sizes that they were measured with.
    """

    name: str
    title: str
    explanation: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    targets: list[Target] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> list[list[str]]:
        """The table's cells."""
        return [[column.of(row) for column in self.columns] for row in self.rows]

    def write(self, folder: Path, profile: Profile) -> Path:
        """Write `NAME.json` with the figures, settings, versions and seed."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.name,
            "title": self.title,
            "explanation": self.explanation,
            "measured": today(),
            "profile": profile.name,
            "seed": profile.seed,
            "settings": self.settings,
            "versions": versions(),
            "machine": machine(),
            "rows": self.rows,
            "targets": [vars(target) | {"holds": target.holds} for target in self.targets],
        }
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")

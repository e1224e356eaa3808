"""Show results as tables in the terminal, and as Markdown next to the JSON files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import machine, versions
from benchmarks.result import Result, Target


def show(result: Result, console: Console) -> None:
    """Print one benchmark's table, and its targets in a line."""
    table = Table(title=result.title, caption=result.explanation, title_justify="left", caption_justify="left")
    for number, column in enumerate(result.columns):
        table.add_column(column.header, justify="left" if number == 0 else "right")
    for cells in result.table:
        table.add_row(*cells)
    console.print(table)
    held = sum(target.holds for target in result.targets)
    console.print(f"{held} of {len(result.targets)} targets hold.\n", highlight=False)


def missed(results: list[Result]) -> list[Target]:
    """The targets that do not hold."""
    return [target for result in results for target in result.targets if not target.holds]


def surroundings() -> str:
    """One line about where the figures were measured."""
    here, packages = machine(), versions()
    where = f"{here['processor']}, {here['vector_instructions']}, one thread"
    return f"{where}; " + ", ".join(f"{name} {version}" for name, version in packages.items())


def markdown(results: list[Result], measured: str) -> str:
    """Write every table as Markdown."""
    parts = [
        "# Results",
        f"Measured on {measured}: {surroundings()}.",
        "Written by `python -m benchmarks`; the JSON files hold every figure, seed and setting.",
    ]
    for result in results:
        parts += [f"## {result.title}", result.explanation, _table(result)]
        parts.append(f"{sum(target.holds for target in result.targets)} of {len(result.targets)} targets hold.")
    return "\n\n".join(parts) + "\n"


def _table(result: Result) -> str:
    header = [column.header for column in result.columns]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *result.table))


def write_markdown(results: list[Result], folder: Path, measured: str) -> Path:
    """Write `README.md` next to the JSON files."""
    path = folder / "README.md"
    path.write_text(markdown(results, measured), encoding="utf-8")
    return path

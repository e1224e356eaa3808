"""Plots of scores, as PNG files. Contestants have a color and a marker each; PEFT's versions are dashed and hollow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from benchmarks.quality.contestants import CONTESTANTS, PEFT
from benchmarks.quality.standings import is_softhooks, label_of
from benchmarks.quality.statistics import Summary

DPI = 150
BLACK, GRAY = "#000000", "#767676"
# Colors that remain distinct with color blindness: those of Okabe and Ito without yellow, and two of Tol.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#332288", "#882255")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_METHODS = [name for name in CONTESTANTS if is_softhooks(name)]
_OTHERS = {
    "lora": BLACK,
    "full": GRAY,
    "head": GRAY,
    "few_shot": BLACK,
    "zero_shot": BLACK,
    "tfidf": GRAY,
    "majority": GRAY,
}
_LINES = {"few_shot": "-.", "tfidf": "-."}
_DODGE = 0.012
"""The distance of neighboring series on the logarithmic axis of shots, so that their error bars do not overlap."""


@dataclass(frozen=True)
class Point:
    """A score at a value of the horizontal axis."""

    x: float
    score: Summary


def plot_shots(series: Mapping[str, Sequence[Point]], path: Path, *, title: str, score: str) -> None:
    """Plot score against training rows of each class.

    Args:
        series: the points of each contestant. A contestant whose only point is at 0 shots is drawn as a horizontal line.
        path: of the PNG file.
        title: of the plot.
        score: the name of the score.
    """
    figure, axes = _figure(title, width=9.0)
    shots = sorted({point.x for points in series.values() for point in points if point.x > 0})
    for number, (contestant, points) in enumerate(series.items()):
        shift = math.exp(_DODGE * (number - (len(series) - 1) / 2))
        trained = [Point(point.x * shift, point.score) for point in points if point.x > 0]
        if trained:
            _draw(axes, contestant, trained, line=True)
        elif points:
            _draw_level(axes, contestant, points[0])
    if shots:
        _log_ticks(axes, shots)
    axes.set(xlabel="training rows of each class", ylabel=f"{score}, mean ± standard error")
    _save(figure, axes, path)


def plot_trained(series: Mapping[str, Point], path: Path, *, title: str, score: str) -> None:
    """Plot score against the number of trained parameters, on a logarithmic axis.

    Args:
        series: the point of each contestant; contestants without trained parameters are drawn as horizontal lines.
        path, title, score: as in `plot_shots`.
    """
    figure, axes = _figure(title, width=9.0)
    for contestant, point in series.items():
        if point.x > 0:
            _draw(axes, contestant, [point], line=False)
        else:
            _draw_level(axes, contestant, point)
    if any(point.x > 0 for point in series.values()):
        axes.set_xscale("log")
    axes.set(xlabel="trained parameters", ylabel=f"{score}, mean ± standard error")
    _save(figure, axes, path)


def plot_bars(scores: Mapping[str, Summary], path: Path, *, title: str, score: str) -> None:
    """Plot scores as points with error bars, one line of the plot for each label, from top to bottom."""
    figure = Figure(figsize=(7.5, 1.4 + 0.4 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for place, summary in enumerate(scores.values()):
        axes.errorbar(summary.mean, place, xerr=summary.standard_error, fmt="o", color=_COLORS[0], capsize=4)
        axes.annotate(
            f"{summary.mean:.3f}", (summary.mean, place), xytext=(0, 7), textcoords="offset points", ha="center"
        )
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(len(scores) - 0.5, -0.6)
    axes.margins(x=0.1)
    axes.set_title(title)
    axes.set_xlabel(f"{score}, mean ± standard error")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=DPI)


def plot_lines(lines: Mapping[str, Sequence[Point]], path: Path, *, title: str, score: str, xlabel: str) -> None:
    """Plot scores against a number, on a logarithmic axis with a tick at each value."""
    figure, axes = _figure(title, width=7.5)
    for number, (label, points) in enumerate(lines.items()):
        _errorbar(axes, points, {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number]}, label, line=True)
    _log_ticks(axes, sorted({point.x for points in lines.values() for point in points}))
    axes.set(xlabel=xlabel, ylabel=f"{score}, mean ± standard error")
    _save(figure, axes, path)


def _figure(title: str, width: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 5.0), layout="constrained")  # a Figure of its own needs no display
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, axes: Any, path: Path) -> None:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=DPI)


def _log_ticks(axes: Any, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _style(contestant: str) -> dict[str, Any]:
    """Return color, marker, filling and line of a contestant."""
    known = CONTESTANTS.get(contestant)
    method = contestant if known is None or known.twin is None else known.twin
    if method not in _METHODS:
        number = list(_OTHERS).index(contestant) if contestant in _OTHERS else len(_OTHERS)
        line = "-" if known is not None else _LINES.get(contestant, ":")
        return {"color": _OTHERS.get(contestant, GRAY), "marker": _MARKERS[number], "linestyle": line}
    number = _METHODS.index(method)
    style = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % len(_MARKERS)]}
    is_peft = known is not None and known.library == PEFT
    return style | ({"linestyle": "--", "markerfacecolor": "white"} if is_peft else {"linestyle": "-"})


def _draw_level(axes: Any, contestant: str, point: Point) -> None:
    """Draw a horizontal line."""
    style = _style(contestant)
    axes.axhline(point.score.mean, color=style["color"], linestyle=style["linestyle"], label=label_of(contestant))


def _draw(axes: Any, contestant: str, points: Sequence[Point], *, line: bool) -> None:
    _errorbar(axes, points, _style(contestant), label_of(contestant), line=line)


def _errorbar(axes: Any, points: Sequence[Point], style: dict[str, Any], label: str, *, line: bool) -> None:
    points = sorted(points, key=lambda point: point.x)
    axes.errorbar(
        [point.x for point in points],
        [point.score.mean for point in points],
        yerr=[point.score.standard_error for point in points],
        label=label,
        capsize=3,
        linewidth=1.5,
        **(style | ({} if line else {"linestyle": "none"})),
    )

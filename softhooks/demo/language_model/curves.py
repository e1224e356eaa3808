"""A picture of the learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from softhooks.demo.language_model.train import Curves

LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Line styles of the baselines."""


def plot_curves(curves: Mapping[str, Curves], baselines: Mapping[str, float], path: Path, title: str) -> None:
    """Draw training loss and accuracy on the development rows against training steps, and save the picture.

    Args:
        curves: the curves of each training run.
        baselines: accuracies on the test rows, drawn as dashed lines.
        path: a file whose suffix names the format.
        title: the title of the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")  # a Figure of its own needs no display
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for color, (name, curve) in enumerate(curves.items()):
        left.plot(*zip(*curve.losses, strict=True), color=f"C{color}", label=name)
        right.plot(*zip(*curve.accuracies, strict=True), color=f"C{color}", marker="o", label=name)
    names: dict[float, list[str]] = {}
    for name, accuracy in baselines.items():
        names.setdefault(accuracy, []).append(name)
    for style, (accuracy, equal) in zip(cycle(LINES), names.items()):
        label = f"{', '.join(equal)} (test rows)"
        right.axhline(accuracy, color="0.35", linestyle=style, linewidth=1.2, label=label)
    left.set(xlabel="training step", ylabel="training loss (mean of 10 steps)", yscale="log")
    right.set(xlabel="training step", ylabel="accuracy on development rows", ylim=(0, 1))
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)

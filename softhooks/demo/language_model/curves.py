"""A picture of the learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from softhooks.demo.language_model.train import Curves


def plot_curves(curves: Mapping[str, Curves], baselines: Mapping[str, float], path: Path) -> None:
    """Draw training loss and accuracy on the development rows against training steps, and save the picture.

    Args:
        curves: the curves of each training run.
        baselines: accuracies on the test rows, drawn as dashed lines.
        path: a file whose suffix names the format.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")  # a Figure of its own needs no display
    left, right = figure.subplots(1, 2)
    for color, (name, curve) in enumerate(curves.items()):
        left.plot(*zip(*curve.losses, strict=True), color=f"C{color}", label=name)
        right.plot(*zip(*curve.accuracies, strict=True), color=f"C{color}", marker="o", label=name)
    for shade, (name, accuracy) in enumerate(baselines.items()):
        right.axhline(accuracy, color=str(0.3 + 0.2 * shade), linestyle="--", linewidth=1, label=name)
    left.set(xlabel="training step", ylabel="training loss (mean of 10 steps)", yscale="log")
    right.set(xlabel="training step", ylabel="accuracy on development rows", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)

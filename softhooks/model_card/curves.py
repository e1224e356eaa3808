"""The training curves of a model card, as a picture and as a table."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from softhooks.model_card.markdown import code, table
from softhooks.model_card.training_run import LOSS, TrainingRun

PICTURE = "training_curves.png"
TITLES = {LOSS: "training loss"}
_MAX_ROWS = 12
_MAX_METRICS = 6


def draw(run: TrainingRun, folder: Path) -> Path | None:
    """Draw the training loss and the evaluation metrics against the steps, if matplotlib is installed and there are curves."""
    curves = {name: points for name, points in run.curves().items() if len(points) > 1}
    if not curves or find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses = [name for name in curves if name.endswith(LOSS)]
    others = [name for name in curves if name not in losses][:_MAX_METRICS]
    groups = [(names, label) for names, label in ((losses, "loss"), (others, "metric")) if names]
    figure = Figure(figsize=(5 * len(groups), 3.5), layout="constrained")
    for axes, (names, label) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for name in names:
            axes.plot(*zip(*curves[name], strict=True), label=TITLES.get(name, name), marker="o", markersize=3)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    return path


def rows(run: TrainingRun) -> str:
    """Return a table of the training loss and the evaluation metrics at evenly spaced steps, always with the last step."""
    curves = {name: dict(points) for name, points in run.curves().items()}
    names = [*(name for name in curves if name == LOSS), *sorted(name for name in curves if name != LOSS)][
        : _MAX_METRICS + 1
    ]
    steps = sorted({step for name in names for step in curves[name]})
    evaluated = sorted({step for name in names if name != LOSS for step in curves[name]})
    shown = _thinned(evaluated if len(evaluated) > 1 else steps)
    cells = [[str(step), *(_value(curves[name], step) for name in names)] for step in shown]
    return table(["step", *map(_title, names)], cells)


def _thinned(steps: list[int]) -> list[int]:
    if len(steps) <= _MAX_ROWS:
        return steps
    last = len(steps) - 1
    return [steps[round(number * last / (_MAX_ROWS - 1))] for number in range(_MAX_ROWS)]


def _value(points: dict[int, float], step: int) -> str:
    """Format the last value at a step or before it, because training and evaluation may be logged at different steps."""
    before = [known for known in points if known <= step]
    return f"{points[max(before)]:.4g}" if before else ""


def _title(name: str) -> str:
    return TITLES.get(name) or code(name)

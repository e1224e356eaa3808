"""Plots as inline SVG that take their colors from the style sheet of the page, so that they suit light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
from torch.nn import functional

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 200, 68, 50, 14
_MOST_CELLS = 64


def bars(values: Sequence[float], *, x: str, y: str, top: float | None = None, unit: str = "") -> str:
    """Draw a bar for each value.

    Args:
        x, y: the titles of the axes.
        top: the largest value of the y axis, or None for the largest of the values.
        unit: `%` to show shares as percentages.
    """
    most = max([*values, 1e-12]) if top is None else top
    step = (_WIDTH - _LEFT) / len(values)
    height = _HEIGHT - _TOP - _BOTTOM
    parts = [_axes(most, x, y, unit)]
    for number, value in enumerate(values):
        size = max(min(value / most, 1.0), 0.0) * height
        place = _LEFT + number * step
        parts.append(
            f'<rect class="bar" x="{place + step * 0.1:.1f}" y="{_TOP + height - size:.1f}" width="{step * 0.8:.1f}" '
            f'height="{size:.1f}"><title>{escape(x)} {number}: {_number(value, unit)}</title></rect>'
        )
    every = max(1, -(-len(values) // 12))
    parts += [
        f'<text x="{_LEFT + (number + 0.5) * step:.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{number}</text>'
        for number in range(0, len(values), every)
    ]
    return _svg(_WIDTH, _HEIGHT, f"{y} by {x}", parts)


def heatmap(rows: Sequence[Sequence[float]], *, title: str) -> str:
    """Draw a square of cells for values from -1 to 1; more than 64 rows are averaged in groups."""
    table = torch.tensor(rows)
    count = len(table)
    if count > _MOST_CELLS:
        table = functional.adaptive_avg_pool2d(table[None], (_MOST_CELLS, _MOST_CELLS))[0]
    cells, size, left, bottom = len(table), 320, 40, 34
    step = size / cells
    parts = []
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            kind = "above" if value >= 0 else "below"
            parts.append(
                f'<rect class="{kind}" x="{left + column * step:.2f}" y="{row * step:.2f}" width="{step:.2f}" '
                f'height="{step:.2f}" fill-opacity="{abs(value):.3f}"><title>{value:.2f}</title></rect>'
            )
    last = count - 1
    parts += [
        f'<text x="{left - 6}" y="12" text-anchor="end">0</text>',
        f'<text x="{left - 6}" y="{size}" text-anchor="end">{last}</text>',
        f'<text x="{left}" y="{size + 16}">0</text>',
        f'<text x="{left + size}" y="{size + 16}" text-anchor="end">{last}</text>',
        f'<text x="{left + size / 2}" y="{size + 16}" text-anchor="middle">virtual token</text>',
        f'<rect class="frame" x="{left}" y="0" width="{size}" height="{size}"/>',
    ]
    return _svg(left + size + 2, size + bottom, title, parts, narrow=True)


def _axes(most: float, x: str, y: str, unit: str) -> str:
    base, middle = _HEIGHT - _BOTTOM, _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    lines = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{_mark(value, unit)}</text>'
        for place, value in ((_TOP, most), (middle, most / 2), (base, 0.0))
    )
    return f'{lines}<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'


def _mark(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.3g}"


def _number(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.3g}"


def _svg(width: float, height: float, title: str, parts: Sequence[str], *, narrow: bool = False) -> str:
    kind = ' class="narrow"' if narrow else ""
    return (
        f'<svg{kind} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )

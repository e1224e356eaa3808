"""Shapes of the drawings: boxes, cells, arrows and labels, readable on light and on dark backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

CELL, GAP = 38, 4
HEIGHT = 30

_STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; text-anchor: middle; }
.box text { fill: #fff; }
.label { fill: #3b4552; }
.start { text-anchor: start; }
.prompt rect { fill: #b4530a; }
.frozen rect { fill: #5b6675; }
.text rect { fill: #1d5fc4; }
.result rect { fill: #14773f; }
.fixed rect { fill: #1d5fc4; stroke: #d97a2b; stroke-width: 3; }
.line { stroke: #7b8794; stroke-width: 2; fill: none; }
.head { fill: #7b8794; }
@media (prefers-color-scheme: dark) { .label { fill: #c9d1d9; } }
"""


class Drawing:
    """An SVG that grows by shapes; all coordinates are pixels.

    Args:
        title: what the drawing shows, for screen readers.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, text: str, kind: str = "frozen", height: float = HEIGHT) -> None:
        """Draw a box with text in its middle; its kind is its color."""
        lines = text.split("\n")
        rows = "".join(
            f'<text x="{x + width / 2:g}" y="{y + height / 2 + 5 + 18 * (i - (len(lines) - 1) / 2):g}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        )
        self.shapes.append(
            f'<g class="box {kind}"><rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>{rows}</g>'
        )

    def cells(self, x: float, y: float, texts: Sequence[str], kind: str, width: float = CELL) -> float:
        """Draw boxes side by side, and return where the next one would begin."""
        for text in texts:
            self.box(x, y, width, text, kind)
            x += width + GAP
        return x

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through the points, with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        path = " ".join(f"{px:g},{py:g}" for px, py in points)
        dx, dy = (0 if x == x0 else (1 if x > x0 else -1)), (0 if y == y0 else (1 if y > y0 else -1))
        corners = [(x, y), (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx)]
        head = " ".join(f"{px:g},{py:g}" for px, py in corners)
        self.shapes.append(f'<polyline class="line" points="{path}"/><polygon class="head" points="{head}"/>')

    def label(self, x: float, y: float, text: str, start: bool = False) -> None:
        """Write text outside boxes, centered at x or starting there."""
        self.shapes.append(f'<text class="label{" start" * start}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def render(self) -> str:
        """Return the file's text."""
        width, height = self.size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'role="img" aria-label="{escape(self.title)}">\n<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n'
            + "\n".join(self.shapes)
            + "\n</svg>\n"
        )

"""Write the drawings to docs/images: `python docs/site/draw.py`. A test compares the files with this script's output."""

from __future__ import annotations

from pathlib import Path

from drawings import injections, methods

IMAGES = Path(__file__).parents[1] / "images"


def drawings() -> dict[str, str]:
    """Return the SVG of each drawing by its file name."""
    parts = {"injection": injections.ALL, "method": methods.ALL}
    return {f"{part}-{name}.svg": draw().render() for part, all_of in parts.items() for name, draw in all_of.items()}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (IMAGES / name).write_text(text, encoding="utf-8")

"""What `softhooks inspect` prints about virtual tokens, gates and attention."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softhooks.cli.visible import visible

_BAR = 24
_MOST = 24
"""The largest number of virtual tokens that are shown in a terminal."""


def slot_facts(prompt: dict[str, Any]) -> list[tuple[str, str]]:
    """Return one line for each tensor of virtual tokens."""
    lines: list[tuple[str, str]] = []
    for one in prompt["slots"]:
        norms = [float(norm) for norm in one["norms"]]
        text = f"norms {min(norms):.4g} to {max(norms):.4g}"
        if one["most_similar"] is not None:
            cosine, slot = max((float(other["cosine"]), number) for number, other in enumerate(one["most_similar"]))
            text += f"; most similar {slot} and {one['most_similar'][slot]['slot']} ({cosine:.2f})"
        if one["drift"] is not None:
            moved = [float(distance) for distance in one["drift"]["distance"]]
            text += f"; moved {min(moved):.4g} to {max(moved):.4g} from {prompt['drift_from']}"
        name = "" if len(prompt["slots"]) == 1 else f"{one['tensor']}: "
        lines.append(("slots" if not lines else "", name + text))
    return lines


def show_slots(prompt: dict[str, Any], console: Console) -> None:
    """Print a table of the virtual tokens if the base model or the initial prompt is known, then attention and gates."""
    on_model = prompt["on_model"]
    if on_model is not None or prompt["drift_from"] is not None:
        for one in prompt["slots"]:
            words = None if on_model is None else on_model["nearest_words"]
            console.print(_slots(one, words), *_rest(one))
    if on_model is not None:
        for title, shares in (on_model["attention"] or {}).items():
            console.print(_bars(f"attention to the prompt, {title}", shares, percent=True))
        if on_model["attention_not_measured"]:
            reason = visible(on_model["attention_not_measured"])
            console.print(Text(f"  attention to the prompt: not measured ({reason})"), soft_wrap=True)
    for gates in prompt["gates"]:
        values, kind = (gates["mean"], "mean") if gates["mean"] is not None else (gates["largest"], "largest")
        console.print(_bars(f"gates of {visible(gates['stack'])}, {kind} size", values, percent=False))


def _slots(one: dict[str, Any], words: list[list[dict[str, Any]]] | None) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    table.add_column("  slot", justify="right")
    table.add_column("norm", justify="right")
    table.add_column("most similar")
    if one["drift"] is not None:
        table.add_column("moved", justify="right")
        table.add_column("cosine", justify="right")
    if words is not None:
        table.add_column("nearest words", overflow="fold")
    for slot, norm in enumerate(one["norms"][:_MOST]):
        near = None if one["most_similar"] is None else one["most_similar"][slot]
        row = [str(slot), f"{float(norm):.4g}", "" if near is None else f"{near['slot']} ({float(near['cosine']):.2f})"]
        if one["drift"] is not None:
            row += [f"{float(one['drift']['distance'][slot]):.4g}", f"{float(one['drift']['cosine'][slot]):.2f}"]
        if words is not None:
            row.append(", ".join(f"{visible(word['token'])} {word['cosine']:.2f}" for word in words[slot]))
        table.add_row(*map(Text, row))
    return table


def _rest(one: dict[str, Any]) -> list[Text]:
    more = len(one["norms"]) - _MOST
    return [Text(f"  and {more} more virtual tokens; --json and --html show all")] if more > 0 else []


def _bars(title: str, values: list[Any], *, percent: bool) -> Table:
    """Return a bar for each layer."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    table.add_column("  layer", justify="right")
    table.add_column(title)
    most = 1.0 if percent else max([float(value) for value in values] + [1e-9])
    for layer, value in enumerate(values):
        bar = "█" * round(_BAR * float(value) / most)
        table.add_row(str(layer), Text(f"{bar} {float(value):.1%}" if percent else f"{bar} {float(value):.4g}"))
    return table

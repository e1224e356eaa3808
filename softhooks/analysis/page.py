"""The page that `softhooks inspect --html` writes: one file with tables and plots, without scripts or other files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from softhooks._version import __version__
from softhooks.analysis.svg import bars, heatmap
from softhooks.formats.files import replacing

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #ffffff; --faint: #5c6675; --line: #d8dde4; --accent: #2f6fb3;
  --above: #2f6fb3; --below: #b3542f; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #12161c; --faint: #9aa5b4; --line: #2c3440;
  --accent: #6aa9e9; --above: #6aa9e9; --below: #e9946a; --card: #1a2029; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
section { border-top: 1px solid var(--line); padding-top: .5rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; } .facts th { width: 8rem; }
code, .word { font-family: ui-monospace, monospace; font-size: .85em; }
.word { background: var(--card); border: 1px solid var(--line); border-radius: .25rem; padding: 0 .25rem; margin-right: .25rem;
  display: inline-block; white-space: pre-wrap; }
p, figcaption { color: var(--faint); } figure { margin: 1rem 0; }
svg { width: 100%; height: auto; display: block; } svg.narrow { max-width: 24rem; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
.bar { fill: var(--accent); } .above { fill: var(--above); } .below { fill: var(--below); }
@media (max-width: 40rem) { svg:not(.narrow) text { font-size: 20px; } }
.grid { stroke: var(--line); } .frame { fill: none; stroke: var(--line); }
"""


def write_page(path: Path, prompts: Sequence[dict[str, Any]]) -> None:
    """Write the page.

    Args:
        prompts: the facts about each prompt, with the similarities of its virtual tokens.
    """
    title = prompts[0]["path"] if len(prompts) == 1 else f"{len(prompts)} soft prompts"
    body = "".join(f"<section>{''.join(_prompt(one))}</section>" for one in prompts)
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main>"
        f"<p>Written by softhooks {escape(__version__)}.</p></body></html>\n"
    )
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")


def _prompt(one: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of a section."""
    yield f"<h1>{_text(one['path'])}</h1>"
    yield f"<p>{_text(one['class'])}, {one['num_virtual_tokens']} virtual tokens, written by {_text(one['format'])}</p>"
    yield _facts(one)
    on_model = one["on_model"] or {"nearest_words": None, "attention": None, "attention_not_measured": None}
    for slots in one["slots"]:
        yield from _slots(slots, one, on_model["nearest_words"])
    yield from _layers(one, on_model)
    yield "<h2>Tensors</h2>"
    yield _table(
        ("tensor", "shape", "numbers", "norms of rows"),
        (
            (_code(t["name"]), " x ".join(map(str, t["shape"])), _text(t["dtype"]), _norms(t["row_norms"]))
            for t in one["tensors"]
        ),
    )


def _facts(one: dict[str, Any]) -> str:
    base = one["base"]
    options = {name: value for name, value in one["options"].items() if value is not None}
    rows = [
        ("method", _text(one["method"])),
        ("options", ", ".join(_code(f"{name}={value!r}"[:120]) for name, value in options.items())),
        ("base model", f"{_text(base['class'] or base['task'] or 'unknown')} {_text(base['name_or_path'] or '')}"),
        ("revision", _text(base["revision"] or "not known")),
        ("parameters", f"{one['parameters']['prompt']:,} in the prompt, {one['parameters']['heads']:,} in heads"),
        ("file", f"{_text(one['file'])}, {one['bytes']:,} bytes"),
        ("versions", ", ".join(_text(f"{name} {version}") for name, version in one["versions"].items()) or "not known"),
    ]
    if one["on_model"] is not None:
        share = one["parameters"]["prompt"] / max(one["on_model"]["model_parameters"], 1)
        rows.append(("on the model", f"enters as {_text(one['on_model']['injection'])}; {share:.4%} of its parameters"))
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="facts">{cells}</table>'


def _slots(slots: dict[str, Any], one: dict[str, Any], words: list[list[dict[str, Any]]] | None) -> Iterator[str]:
    """Yield the plots and the table of the virtual tokens in one tensor."""
    name = "" if len(one["slots"]) == 1 else f", {_text(slots['tensor'])}"
    yield f"<h2>Virtual tokens{name}</h2>"
    norms = [float(norm) for norm in slots["norms"]]
    yield _figure(bars(norms, x="virtual token", y="norm"), "The norm of each virtual token.")
    if slots["drift"] is not None:
        moved = [float(distance) for distance in slots["drift"]["distance"]]
        caption = f"How far each virtual token has moved from {_text(one['drift_from'])}."
        yield _figure(bars(moved, x="virtual token", y="distance"), caption)
    if slots["most_similar"] is not None:
        plot = heatmap([[float(value) for value in row] for row in slots["similarity"]], title="cosine similarities")
        caption = "The cosine similarity of each virtual token to each other one: blue is positive, orange negative."
        yield _figure(plot, caption)
    yield _table(("slot", "norm", *_titles(slots, words)), _rows(slots, words))


def _titles(slots: dict[str, Any], words: object) -> Iterator[str]:
    yield "most similar"
    if slots["drift"] is not None:
        yield from ("moved", "cosine")
    if words is not None:
        yield "nearest words"


def _rows(slots: dict[str, Any], words: list[list[dict[str, Any]]] | None) -> Iterator[list[str]]:
    for slot, norm in enumerate(slots["norms"]):
        near = None if slots["most_similar"] is None else slots["most_similar"][slot]
        row = [str(slot), f"{float(norm):.4g}", "" if near is None else f"{near['slot']} ({float(near['cosine']):.2f})"]
        if slots["drift"] is not None:
            row += [f"{float(slots['drift']['distance'][slot]):.4g}", f"{float(slots['drift']['cosine'][slot]):.2f}"]
        if words is not None:
            row.append(" ".join(_word(word) for word in words[slot]))
        yield row


def _word(word: dict[str, Any]) -> str:
    return f'<span class="word" title="id {word["id"]}">{_text(word["token"])}</span>{word["cosine"]:.2f}'


def _layers(one: dict[str, Any], on_model: dict[str, Any]) -> Iterator[str]:
    """Yield the plots of attention and gates."""
    if on_model["attention"] or on_model["attention_not_measured"]:
        yield "<h2>Attention by layer</h2>"
    for title, shares in (on_model["attention"] or {}).items():
        caption = (
            f"{_text(title)}: the share of attention that goes to the prompt, as a mean over heads and the tokens of this "
            f"text: <q>{_text(on_model['text'])}</q>"
        )
        yield _figure(bars(shares, x="layer", y="share", top=1.0, unit="%"), caption)
    if on_model["attention_not_measured"]:
        yield f"<p>Not measured: {_text(on_model['attention_not_measured'])}.</p>"
    for gates in one["gates"]:
        values, kind = (gates["mean"], "mean") if gates["mean"] is not None else (gates["largest"], "largest")
        yield f"<h2>Gates by layer, {_text(gates['stack'])}</h2>"
        plot = bars([float(value) for value in values], x="layer", y="gate")
        yield _figure(plot, f"The {kind} size of the factors by which the branch is multiplied.")


def _figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{caption}</figcaption></figure>"


def _table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _norms(norms: list[Any] | None) -> str:
    return "none" if norms is None else " to ".join(f"{float(norm):.4g}" for norm in norms)


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _text(value: object) -> str:
    """Escape a value for HTML; control characters and terminal escapes are spelled out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return escape(shown)

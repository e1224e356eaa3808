"""The ways in which a prompt enters a model."""

from __future__ import annotations

from drawings.svg import CELL, GAP, Drawing

P = ("p₁", "p₂", "p₃")
TEXT = ("x₁", "x₂", "x₃", "x₄")
STEP = CELL + GAP


def slots() -> Drawing:
    """Virtual tokens in the sequence, which are removed from the outputs."""
    d = Drawing(500, 200, "Slots: virtual tokens are inserted into the sequence and removed from the outputs")
    end = d.cells(20, 160, P, "prompt")
    d.cells(end, 160, TEXT, "text")
    d.box(20, 85, 7 * STEP - GAP, "all layers of the frozen model", height=40)
    for i in range(7):
        x = 20 + i * STEP + CELL / 2
        d.arrow((x, 158), (x, 128))
        if i >= 3:
            d.arrow((x, 83), (x, 54))
    d.cells(end, 20, ("h₁", "h₂", "h₃", "h₄"), "result")
    d.label(20, 40, "removed", start=True)
    d.label(330, 180, "embeddings [P; X]", start=True)
    d.label(330, 40, "states of the text only", start=True)
    return d


def shared() -> Drawing:
    """The prompt runs once, at batch size 1; all rows use its keys and values."""
    d = Drawing(500, 235, "Shared: the model runs on the prompt once, and all rows use the resulting keys and values")
    d.cells(20, 190, P, "prompt")
    d.box(20, 120, 3 * STEP - GAP, "layers, once", height=36)
    d.arrow((81, 188), (81, 159))
    d.box(20, 50, 3 * STEP - GAP, "K, V of P", "prompt", height=36)
    d.arrow((81, 118), (81, 89))
    for row, y in enumerate((20, 90, 160)):
        d.box(230, y, 110, "layers", height=36)
        d.cells(350, y + 3, (f"row {row + 1}",), "text", width=70)
        d.arrow((144, 68), (187, 68), (187, y + 18), (228, y + 18))
    d.label(325, 222, "B rows; their positions start at P")
    return d


def attention() -> Drawing:
    """A prefix joins the keys and values inside each attention function."""
    d = Drawing(
        500, 210, "Attention: the prefix's keys and values join those of the text inside each layer's attention"
    )
    end = d.cells(20, 20, ("k₁", "k₂"), "prompt")
    d.cells(end, 20, TEXT, "text")
    end = d.cells(20, 60, ("v₁", "v₂"), "prompt")
    d.cells(end, 60, TEXT, "text")
    d.label(285, 40, "keys: prefix, then text", start=True)
    d.label(285, 80, "values: prefix, then text", start=True)
    d.box(20, 120, 6 * STEP - GAP, "the layer's attention function", height=36)
    d.arrow((125, 92), (125, 117))
    d.cells(end, 175, TEXT, "text")
    d.arrow((end + 80, 173), (end + 80, 159))
    d.label(285, 195, "queries: text only", start=True)
    d.label(285, 142, "in each layer; cache unchanged", start=True)
    return d


def cache() -> Drawing:
    """The model reads the prefix from a cache whose first part is read-only."""
    d = Drawing(500, 160, "Cache: the model reads the prefix as the read-only first part of its cache")
    d.box(20, 20, 130, "prefix\n(read-only)", "prompt", height=50)
    d.box(154, 20, 150, "the model's own\ncache", "text", height=50)
    d.box(20, 110, 284, "a layer without attention interface", height=36)
    d.arrow((120, 73), (120, 107))
    d.arrow((230, 107), (230, 73))
    d.label(130, 95, "reads", start=True)
    d.label(240, 95, "writes", start=True)
    d.label(320, 50, "GPT-J, BLOOM, Falcon", start=True)
    return d


def written_out() -> Drawing:
    """The inline attention of an encoder is replaced by an equal one that a prefix can enter."""
    d = Drawing(500, 170, "Written out: inline attention is replaced by an equal computation that a prefix can enter")
    d.box(20, 20, 190, "inline attention\nof the encoder", height=50)
    d.box(280, 20, 190, "the same computation\nas a function", height=50)
    d.arrow((213, 45), (277, 45))
    d.label(245, 90, "attach compares both")
    d.box(280, 120, 190, "keys and values", "prompt")
    d.arrow((375, 118), (375, 73))
    return d


def branch() -> Drawing:
    """A second attention over the virtual tokens, times a gate."""
    d = Drawing(500, 220, "Branch: a second attention over virtual tokens is multiplied by a gate and added")
    d.box(20, 100, 180, "attention over the text", height=36)
    d.box(270, 100, 210, "gate · attention over P", "prompt", height=36)
    d.cells(60, 180, ("text",), "text", width=100)
    d.cells(312, 180, P, "prompt")
    d.arrow((110, 178), (110, 139))
    d.arrow((375, 178), (375, 139))
    d.arrow((162, 195), (235, 195), (235, 150), (290, 150), (290, 139))
    d.label(228, 213, "queries")
    d.box(160, 20, 180, "output projection", height=36)
    d.arrow((110, 98), (110, 80), (235, 80), (235, 59))
    d.arrow((375, 98), (375, 80), (265, 80), (265, 59))
    d.label(250, 97, "+")
    return d


ALL = {
    "slots": slots,
    "shared": shared,
    "attention": attention,
    "cache": cache,
    "written-out": written_out,
    "branch": branch,
}

"""The kinds of prompts: one for each way in which a prompt can enter a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import softhooks
from softhooks.method import Method

VIRTUAL = 4
"""P, the number of virtual tokens."""
ANCHOR = 90
"""The id after which slots are inserted; it stands once in each row of an example, in different columns."""


@dataclass(frozen=True)
class Kind:
    """A kind of prompt.

    Attributes:
        make: makes the method.
        offsets: for prompts of embeddings, how many of a row's tokens stand before each slot, given the row's ids.
    """

    name: str
    title: str
    make: Callable[[], Method]
    offsets: Callable[[list[int]], list[int]] | None = None


def _anchored() -> Method:
    layout = softhooks.Layout.insert(start=1, after={ANCHOR: VIRTUAL - 1})
    return softhooks.PTuning(layout=layout, encoder="none")


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "prompt",
            "embedding prompt",
            lambda: softhooks.PromptTuning(VIRTUAL, init="random"),
            lambda ids: [0] * VIRTUAL,
        ),
        Kind("prefix", "key-value prefix", lambda: softhooks.PrefixTuning(VIRTUAL, init="random")),
        Kind("adapter", "gated adapter", lambda: softhooks.LlamaAdapter(VIRTUAL)),
        Kind(
            "slots",
            "slots after the first token",
            lambda: softhooks.PromptTuning(VIRTUAL, init="random", placement="after_first"),
            lambda ids: [1] * VIRTUAL,
        ),
        Kind(
            "anchors",
            "slots at anchors",
            _anchored,
            lambda ids: [0] + [ids.index(ANCHOR) + 1] * (VIRTUAL - 1),
        ),
    )
}

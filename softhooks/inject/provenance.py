"""Notes on what a forward hands out and takes back, caches and encoder states: the prompts that it was made with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.anatomy import first_state
from softhooks.errors import PromptNotReachedError, UnsupportedModeError, explain

_NOTE = "_softhooks_made_with"


def caches_in(output: Any) -> list[Any]:
    """The cache in a stack's output, whether the caller gave it or the stack made it."""
    items = [] if isinstance(output, Tensor) else output if isinstance(output, tuple) else output.values()
    return [item for item in items if hasattr(item, "get_seq_length")]


def note_caches(output: Any, selection: str | None) -> None:
    """Note on the cache in a stack's output which prompts it was filled with."""
    for cache in caches_in(output):
        setattr(cache, _NOTE, selection)


def require_own_cache(cache: Any, selection: str | None) -> None:
    """Check that what a cache holds was computed with the prompts that are on; note them on an empty one.

    Args:
        selection: the prompts that are on, in words; None: the bare model.

    Raises:
        UnsupportedModeError: it was filled without, or with others.
    """
    if not hasattr(cache, "get_seq_length"):
        return
    made = getattr(cache, _NOTE, None)
    if made == selection:
        return
    if int(cache.get_seq_length()):
        raise UnsupportedModeError(
            explain(
                "a cache serves the prompts that it was filled with: every key in it depends on them.",
                "Continue with these prompts on, or start again from the text without the cache.",
                filled=f"with {made}" if made else "without a prompt",
                now=f"with {selection}" if selection else "without a prompt",
            )
        )
    setattr(cache, _NOTE, selection)


def note_encoded(output: Any, selection: str) -> None:
    """Note on an encoder's output, and on its states, which prompts it ran with."""
    for part in (output, first_state(output)):
        if not isinstance(part, tuple):
            setattr(part, _NOTE, selection)


def require_encoded(given: Any, selection: str) -> None:
    """Check that an encoder's output, which a caller brings along, was made with the prompts that are on.

    Beams copy the states and keep the output that holds them; so either may bear the note.

    Raises:
        PromptNotReachedError: it was made without, or with others.
    """
    parts = [given, *([first_state(given)] if isinstance(given, (tuple, list, dict)) and len(given) else [])]
    made = [getattr(part, _NOTE) for part in parts if hasattr(part, _NOTE)]
    if selection not in made:
        raise PromptNotReachedError(
            explain(
                "a decoder must be given the states of an encoder that ran with the prompt.",
                "Let the model run its encoder itself, or call the encoder while the prompt is on and pass its output as "
                "it is.",
                encoder_outputs=f"made with {made[0]}" if made else "made without",
                now=selection,
            )
        )

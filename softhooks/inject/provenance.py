"""Notes on what a forward hands out and takes back, caches and encoder states: the prompts that it was made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from softhooks.backbone.stack import first_state
from softhooks.errors import PromptNotReachedError, UnsupportedModeError
from softhooks.inject.prompt_state import Made

_NOTE = "_softhooks_made_with"


def cache_of(call: dict[str, Any]) -> Any:
    """The cache in the arguments of a stack's forward; models of recurrent layers alone have another name for it.

    Raises:
        UnsupportedModeError: the model keeps its state in a form that cannot tell what it holds.
    """
    if call.get("state") is not None:
        raise UnsupportedModeError(
            "a prompt needs a state that can tell whether it holds the prompt already.",
            "Generate with `use_cache=False`.",
            state=f"a {type(call['state']).__name__} of tensors",
        )
    cache = call.get("past_key_values")
    return call.get("cache_params") if cache is None else cache


def is_recurrent(cache: Any) -> bool:
    """Whether a cache holds the states of recurrent layers alone, which have no columns to count."""
    layers = getattr(cache, "layers", None) or ()
    return bool(len(layers)) and not any(isinstance(layer, CacheLayerMixin) for layer in layers)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything: keys and values, or the state of a recurrent layer."""
    for layer in getattr(cache, "layers", None) or ():
        states = getattr(layer, "has_previous_state", False)  # one answer, or one for each state of the layer
        if any(states.values()) if isinstance(states, dict) else states:
            return True
    return cache is not None and not is_recurrent(cache) and bool(int(cache.get_seq_length()))


def caches_in(output: Any) -> list[Any]:
    """The cache in a stack's output, whether the caller gave it or the stack made it."""
    items = [] if isinstance(output, Tensor) else output if isinstance(output, tuple) else output.values()
    return [item for item in items if hasattr(item, "get_seq_length")]


def note_caches(output: Any, made: Callable[[], Made]) -> None:
    """Note on a cache that the stack has made which prompts it was filled with; one that was given has its note."""
    for cache in caches_in(output):
        if getattr(cache, _NOTE, None) is None:
            setattr(cache, _NOTE, made())


def require_own_cache(cache: Any, now: Made | None) -> None:
    """Check that what a cache holds was computed with the prompts that are on, as they are; note them on an empty one.

    Args:
        now: the prompts that are on; None: the bare model.

    Raises:
        UnsupportedModeError: it was filled without, with others, or before they changed.
    """
    if not hasattr(cache, "get_seq_length"):
        return
    made: Made | None = getattr(cache, _NOTE, None)
    difference = ("others" if made else None) if now is None else now.difference(made)
    if difference is None:
        return
    if is_filled(cache):
        raise UnsupportedModeError(
            "a cache serves the prompts that it was filled with: every key in it depends on them.",
            "Continue with these prompts on, or start again from the text without the cache.",
            filled=_told(made, now, difference),
            now=f"with {now.words}" if now else "without a prompt",
        )
    setattr(cache, _NOTE, now)


def _told(made: Made | None, now: Made | None, difference: str) -> str:
    if made is None:
        return "without a prompt"
    return f"with {made.words}" + ("" if now is None or made.words != now.words else f", {difference}")


def note_encoded(output: Any, made: Made) -> None:
    """Note on an encoder's output, and on its states, which prompts it ran with."""
    for part in (output, first_state(output)):
        if not isinstance(part, tuple):
            setattr(part, _NOTE, made)


def require_encoded(given: Any, now: Made) -> None:
    """Check that an encoder's output, which a caller brings along, was made with the prompts that are on.

    Beams copy the states and keep the output that holds them; so either may bear the note.

    Raises:
        PromptNotReachedError: it was made without, with others, or before they changed.
    """
    parts = [given, *([first_state(given)] if isinstance(given, (tuple, list, dict)) and len(given) else [])]
    made = [getattr(part, _NOTE) for part in parts if hasattr(part, _NOTE)]
    differences = [now.difference(one) for one in made]
    if None not in differences:
        raise PromptNotReachedError(
            "a decoder must be given the states of an encoder that ran with the prompt.",
            "Let the model run its encoder itself, or call the encoder while the prompt is on and pass its output as "
            "it is.",
            encoder_outputs=f"made {_told(made[0], now, str(differences[0]))}" if made else "made without",
            now=now.words,
        )

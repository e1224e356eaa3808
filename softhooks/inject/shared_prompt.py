"""Decide whether a prompt before the text can be computed once and shared by all rows of a call.

Such a prompt's virtual tokens attend only to each other. So their states do not depend on the text, unless the call has an
argument that affects virtual tokens too: encoder states that a decoder attends to, token types, a language for each row, or any
argument that is not listed here. Such a call uses the injection `slots` instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from softhooks.backbone.stack import Stack
from softhooks.compat.cache_argument import CACHE, NAMES
from softhooks.errors import UnsupportedModeError
from softhooks.inject.cache_notes import note_on
from softhooks.inject.caches import cache_of, is_filled
from softhooks.inject.prefix.paged_cache import paged_cache

_HARMLESS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"),
    *(*NAMES, "state", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),  # the starts of packed documents
    *("per_layer_inputs", "ple_input_ids"),  # for text tokens; virtual tokens get the values of their placeholder ids
    *("visual_pos_masks", "deepstack_visual_embeds", "vision_mask", "deepstack_features"),  # for the tokens of an image
    *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"),
    *("labels", "shift_labels", "num_items_in_batch"),
}
"""Arguments that describe the text or the output and do not affect virtual tokens before the text."""


def reasons_against_sharing(stack: Stack, call: dict[str, Any], length: int) -> list[str]:
    """List the reasons why a prompt of `length` virtual tokens cannot be computed once for a call; empty if it can."""
    if paged_cache(call) is not None:
        return []
    cache = cache_of(call)
    if is_filled(cache):
        # The virtual tokens were already computed when the cache was filled, with or without sharing.
        return [f"{CACHE}, which contain the prompt's slots"] if note_on(cache).slots is not None else []
    found = [name for name, value in call.items() if value is not None and name not in _HARMLESS]
    found = [name for name in found if not _same(call[name], stack.compared_arguments.get(name))]
    if isinstance(cache, EncoderDecoderCache) and is_filled(cache.cross_attention_cache):
        found.append(f"{CACHE}, which contain an encoder's states")
    changes = stack.positions.dynamic_rope_length
    if changes is not None and length + _text_length(call) > changes:
        found.append(f"more than {changes} positions, above which the rotary frequencies of all positions change")
    return found


def _same(value: Any, proven: Any) -> bool:
    """Whether an argument has the value that it had when `attach` compared the shared prompt with slots."""
    return isinstance(value, (bool, int, float, str)) and type(value) is type(proven) and value == proven


def _text_length(call: dict[str, Any]) -> int:
    """Return the number of positions that the longest text of a call takes, without the prompt."""
    positions = call.get("position_ids")
    if isinstance(positions, Tensor):
        return int(positions.max()) + 1
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.long().sum(-1).max())
    text = call.get("input_ids")
    text = call.get("inputs_embeds") if text is None else text
    return text.shape[1] if isinstance(text, Tensor) else 0


def slots_error(reasons: list[str], error: UnsupportedModeError) -> UnsupportedModeError:
    """Return the error for a call that can neither share the prompt (because of `reasons`) nor use slots (because of `error`)."""
    return UnsupportedModeError(
        f"this call has {', '.join(reasons)}, which could change the states of virtual tokens; so the prompt would have to enter "
        f"as slots, which is not possible either:\n{error}"
    )


def always_shared_error(name: str, reasons: list[str]) -> UnsupportedModeError:
    """Return the error for a call that cannot share a prompt that was attached with `injection='shared'`."""
    return UnsupportedModeError(
        f"prompt {name!r} was attached with injection='shared', but this call has {', '.join(reasons)}, which could change the "
        "states of its virtual tokens; a shared prompt is computed once, without the call's arguments.",
        "Leave the argument out, or attach the prompt without `injection='shared'`, so that it enters as slots in this call.",
    )

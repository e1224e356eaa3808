"""What a call brings that could reach a virtual token. Where anything does, a front prompt cannot be computed apart from it.

A virtual token at the front sees only virtual tokens, so long as the call says nothing but what the text is. Encoder states that
a decoder attends to, token types, a language for each row, and whatever else a model may take, can change its states.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from softhooks.backbone.stack import Stack
from softhooks.inject.caches import cache_of, is_filled
from softhooks.inject.notes import slots_in
from softhooks.inject.prefix.paged import paged_cache

_TEXT = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"),
    *("past_key_values", "cache_params", "state", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),  # where packed documents begin
    *("per_layer_inputs", "ple_input_ids"),  # of the text's tokens; the virtual ones have their placeholder's
    *("visual_pos_masks", "deepstack_visual_embeds", "vision_mask", "deepstack_features"),  # for the tokens of an image
}
_OUTPUT = {
    *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"),
    *("labels", "shift_labels", "num_items_in_batch"),
}
_KNOWN = _TEXT | _OUTPUT


def reaching(stack: Stack, call: dict[str, Any], length: int) -> list[str]:
    """Name what may make the states of virtual tokens depend on this call; nothing: computing them alone is exact.

    A cache that is filled decides by how it was filled: the virtual tokens were read then, with what came along then.

    Args:
        length: the virtual tokens.
    """
    if paged_cache(call) is not None:
        return []
    cache = cache_of(call)
    if is_filled(cache):
        return ["past_key_values, which hold the prompt's slots"] if slots_in(cache) is not None else []
    found = [name for name, value in call.items() if value is not None and name not in _KNOWN]
    found = [name for name in found if not _same(call[name], stack.proven.get(name))]
    if isinstance(cache, EncoderDecoderCache) and is_filled(cache.cross_attention_cache):
        found.append("past_key_values, which hold an encoder's states")
    changes = stack.positions.changes
    if changes is not None and length + _last_position(call) > changes:
        found.append(f"more than {changes} positions, from where on the model rotates all of them otherwise")
    return found


def _same(value: Any, proven: Any) -> bool:
    """Whether an argument is what it was when the ways in were compared."""
    return isinstance(value, (bool, int, float, str)) and type(value) is type(proven) and value == proven


def _last_position(call: dict[str, Any]) -> int:
    """How many positions the text of a call takes, without a prompt and without a cache."""
    positions = call.get("position_ids")
    if isinstance(positions, Tensor):
        return int(positions.max()) + 1
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int(mask.long().sum(-1).max())
    text = call.get("input_ids")
    text = call.get("inputs_embeds") if text is None else text
    return text.shape[1] if isinstance(text, Tensor) else 0

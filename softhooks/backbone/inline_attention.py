"""Attention that a model writes out in its own forward, said again as a call of an attention function.

MegatronBERT, RoFormer, RemBERT, MPNet and both DeBERTa compute their scores line by line and ask nobody; as encoders they keep no
cache either. A recipe says one family's attention again: what its queries, keys, values, mask and bias are. While a pass wants to
see keys and values, a module's forward follows its recipe, so that everything that works at the attention function works there.
At attach each recipe is held against the module's own forward; where the two differ, the module counts as unknown.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.stack import Site
from softhooks.backbone.stack_state import RunningPass
from softhooks.errors import UnsupportedModeError

Recipe = Callable[[nn.Module, dict[str, Any], AttentionFunction], Any]
"""Runs an attention module on its forward's arguments, by name, with the attention function that is given."""


def written_out_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as these families do.

    Args:
        attention_mask: [B, 1, 1 or T, K], bool (True: seen) or additive.
        position_bias: added to the scores, [1 or B, Hq, T, K].

    Shape:
        query [B, Hq, T, D], key and value [B, Hq, K, D] -> [B, T, Hq, D] and the weights, [B, Hq, T, K].
    """
    scores = torch.matmul(query, (key * scaling).transpose(-1, -2))
    if position_bias is not None:
        scores = scores + position_bias
    if getattr(module, "head_logits_proj", None) is not None:  # DeBERTa's talking heads
        scores = module.head_logits_proj(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = module.dropout(nn.functional.softmax(scores, dim=-1))
    if getattr(module, "head_weights_proj", None) is not None:
        weights = module.head_weights_proj(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# --- recipes ----------------------------------------------------------------------------------------------------------


def _bert(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """MegatronBERT, RemBERT, and RoFormer, which rotates; also as decoders that keep a cache."""
    states, cache = call["hidden_states"], call.get("past_key_values")
    shape = (*states.shape[:-1], -1, module.attention_head_size)
    query, key, value = (part(states).view(shape).transpose(1, 2) for part in (module.query, module.key, module.value))
    angles = call.get("sinusoidal_pos")
    if angles is not None and module.rotary_value:
        query, key, value = module.apply_rotary_position_embeddings(angles, query, key, value)
    elif angles is not None:
        query, key = module.apply_rotary_position_embeddings(angles, query, key)
    if cache is not None:
        own = getattr(cache, "self_attention_cache", cache)
        key, value = own.update(key, value, module.layer_idx)
    scaling = 1 / math.sqrt(module.attention_head_size)
    output, weights = attention(module, query, key, value, call.get("attention_mask"), scaling=scaling, is_causal=False)
    return output.flatten(2), weights


def _mpnet(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    states, bias = call["hidden_states"], call.get("position_bias")
    shape = (*states.shape[:-1], -1, module.attention_head_size)
    query, key, value = (part(states).view(shape).transpose(1, 2) for part in (module.q, module.k, module.v))
    scaling = 1 / math.sqrt(module.attention_head_size)
    output, weights = attention(
        module, query, key, value, call.get("attention_mask"), scaling=scaling, position_bias=bias, is_causal=False
    )
    return (module.o(output.flatten(2)), weights) if call.get("output_attentions") else (module.o(output.flatten(2)),)


def _deberta(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """The first DeBERTa: one projection for all three, and a bias from the scaled query."""
    query, key, value = module.transpose_for_scores(module.in_proj(call["hidden_states"])).chunk(3, dim=-1)
    query = query + module.transpose_for_scores(module.q_bias[None, None, :])
    value = value + module.transpose_for_scores(module.v_bias[None, None, :])
    parts, bias = 1 + len(module.pos_att_type), None
    query = query / math.sqrt(query.shape[-1] * parts)
    positions, table = call.get("relative_pos"), call.get("rel_embeddings")
    if module.relative_attention and positions is not None and table is not None:
        bias = module.disentangled_att_bias(query, key, positions, module.pos_dropout(table), parts)
    return _disentangled(module, call, attention, (query, key, value), bias, 1.0)


def _deberta_v2(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """DeBERTa-v2 and -v3, whose heads lie in the batch: [B * Hq, T, D]."""
    states, heads = call["hidden_states"], module.num_attention_heads
    projections = (module.query_proj, module.key_proj, module.value_proj)
    flat = [module.transpose_for_scores(part(states), heads) for part in projections]
    parts, bias = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c")), None
    if module.relative_attention:
        table = module.pos_dropout(call["rel_embeddings"])
        bias = module.disentangled_attention_bias(flat[0], flat[1], call.get("relative_pos"), table, parts)
    query, key, value = (part.unflatten(0, (-1, heads)) for part in flat)
    bias = bias.unflatten(0, (-1, heads)) if isinstance(bias, Tensor) else None
    return _disentangled(module, call, attention, (query, key, value), bias, 1 / math.sqrt(query.shape[-1] * parts))


def _disentangled(
    module: Any,
    call: dict[str, Any],
    attention: AttentionFunction,
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Any,
    scaling: float,
) -> Any:
    bias = bias if isinstance(bias, Tensor) else None  # without a kind of relative attention it is the number 0
    mask = call["attention_mask"].bool()
    output, weights = attention(module, *parts, mask, scaling=scaling, position_bias=bias, is_causal=False)
    return output.flatten(2), weights if call.get("output_attentions") else None


_RECIPES: dict[tuple[str, str], Recipe] = {
    ("modeling_megatron_bert", "MegatronBertSelfAttention"): _bert,
    ("modeling_rembert", "RemBertSelfAttention"): _bert,
    ("modeling_roformer", "RoFormerSelfAttention"): _bert,
    ("modeling_mpnet", "MPNetSelfAttention"): _mpnet,
    ("modeling_deberta", "DisentangledSelfAttention"): _deberta,
    ("modeling_deberta_v2", "DisentangledSelfAttention"): _deberta_v2,
}
"""By the last part of the class's module, and the class."""

_ELSEWHERE = ("encoder_hidden_states", "query_states")
"""Arguments with which a module attends to other states than its own; no recipe says that."""


@dataclass(frozen=True)
class Known:
    """What is known of a module of one of the families.

    Attributes:
        names: of its forward's arguments, in order.
    """

    recipe: Recipe
    names: tuple[str, ...]

    def follow(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], attention: AttentionFunction
    ) -> Any:
        """Run a module by its recipe, on the arguments of its forward; None where no recipe says this call."""
        call = dict(zip(self.names, args, strict=False)) | kwargs
        if any(call.get(name) is not None for name in _ELSEWHERE):
            return None
        return self.recipe(module, call, attention)


def known(module: nn.Module) -> Known | None:
    """What is known of a module; None if it is of no family."""
    keys = [(cls.__module__.rpartition(".")[2], cls.__name__) for cls in type(module).__mro__]
    recipe = next((_RECIPES[key] for key in keys if key in _RECIPES), None)
    return None if recipe is None else Known(recipe, tuple(inspect.signature(type(module).forward).parameters)[1:])


# --- on the model -----------------------------------------------------------------------------------------------------


def rewrite(site: Site, live_pass: Callable[[nn.Module], RunningPass | None]) -> None:
    """Let a site's module follow its recipe wherever a pass wants to see its keys and values."""
    own = known(site.module)
    assert own is not None
    site.module.__dict__["forward"] = functools.partial(_forward, site.module, site, own, live_pass)


def unwrite(module: nn.Module) -> None:
    """Give a module its own forward back."""
    if is_replaced(module) and getattr(module.__dict__["forward"], "func", None) is _forward:
        del module.__dict__["forward"]


def is_replaced(module: nn.Module) -> bool:
    """Whether something stands in the place of a module's own forward."""
    return "forward" in module.__dict__


def _forward(
    module: nn.Module,
    first: Site,
    own: Known,
    live_pass: Callable[[nn.Module], RunningPass | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    live = live_pass(module)
    site = first if live is None else live.turn(first)
    if live is None or not live.enters(site):
        return type(module).forward(module, *args, **kwargs)

    def attention(*parts: Any, **options: Any) -> Any:
        return live.attend(site, written_out_attention, parts, options)

    output = own.follow(module, args, kwargs, attention)
    if output is None:
        raise UnsupportedModeError(
            "a prefix enters a layer that writes its attention out only where the layer attends to its own states.",
            "Turn the prompt off for this forward with `softhooks.disabled(model)`.",
            layer=type(module).__name__,
            given=", ".join(name for name in _ELSEWHERE if name in kwargs) or "positional arguments",
        )
    return output

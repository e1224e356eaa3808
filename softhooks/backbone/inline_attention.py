"""Rewrite the forward of modules that compute attention inline, so that it calls an attention function.

MegatronBERT, RoFormer, RemBERT, MPNet, DeBERTa and DeBERTa-v2 do not use transformers' attention interface. The rewritten forward
of each family replaces that of the attention module, so that a prefix can enter. `attach` compares the results of both; if
they differ, the module is not supported.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.stack import Site
from softhooks.backbone.stack_state import RunningPass
from softhooks.compat.cache_argument import cache_in
from softhooks.errors import UnsupportedModeError

FamilyForward = Callable[[nn.Module, dict[str, Any], AttentionFunction], Any]
"""Computes the forward of an attention module from its arguments (by name) and an attention function."""

RewrittenForward = Callable[[tuple[Any, ...], dict[str, Any], AttentionFunction], Any]
"""Computes the forward of one module from `args`, `kwargs` and an attention function; returns None if given `_OTHER_STATES`."""


def inline_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention as the model families in this file do.

    Args:
        attention_mask: [B, 1, 1 or T, K], additive, or bool with True for the keys to attend to.
        position_bias: added to the scores, [1 or B, Hq, T, K].

    Shape:
        query [B, Hq, T, D], key and value [B, Hq, K, D] -> [B, T, Hq, D] and the weights, [B, Hq, T, K].
    """
    scores = torch.matmul(query, (key * scaling).transpose(-1, -2))
    if position_bias is not None:
        scores = scores + position_bias
    if getattr(module, "head_logits_proj", None) is not None:  # talking heads (DeBERTa)
        scores = module.head_logits_proj(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = module.dropout(nn.functional.softmax(scores, dim=-1))
    if getattr(module, "head_weights_proj", None) is not None:
        weights = module.head_weights_proj(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# --- families ---------------------------------------------------------------------------------------------------------


def _bert(module: Any, call: dict[str, Any], attention: AttentionFunction) -> Any:
    """Compute the attention of MegatronBERT, RemBERT and RoFormer, with rotary positions and a cache if they are passed."""
    states, cache = call["hidden_states"], cache_in(call)
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
    """Compute the attention of DeBERTa, which projects query, key and value together and adds a bias from the scaled query."""
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
    """Compute the attention of DeBERTa-v2 and -v3, which fold the heads into the batch dimension, [B * Hq, T, D]."""
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
    bias = bias if isinstance(bias, Tensor) else None  # without relative attention, it is the number 0
    mask = call["attention_mask"].bool()
    output, weights = attention(module, *parts, mask, scaling=scaling, position_bias=bias, is_causal=False)
    return output.flatten(2), weights if call.get("output_attentions") else None


_FAMILIES: dict[tuple[str, str], FamilyForward] = {
    ("modeling_megatron_bert", "MegatronBertSelfAttention"): _bert,
    ("modeling_rembert", "RemBertSelfAttention"): _bert,
    ("modeling_roformer", "RoFormerSelfAttention"): _bert,
    ("modeling_mpnet", "MPNetSelfAttention"): _mpnet,
    ("modeling_deberta", "DisentangledSelfAttention"): _deberta,
    ("modeling_deberta_v2", "DisentangledSelfAttention"): _deberta_v2,
}
"""The forward of each family, by the modeling file and the class of the attention module."""

_OTHER_STATES = ("encoder_hidden_states", "query_states")
"""Arguments that pass states besides the module's own input; the functions above do not support them."""


def rewritten_forward(module: nn.Module) -> RewrittenForward | None:
    """Return the rewritten forward of an attention module, or None if it belongs to no family in this file."""
    keys = [(cls.__module__.rpartition(".")[2], cls.__name__) for cls in type(module).__mro__]
    family = next((_FAMILIES[key] for key in keys if key in _FAMILIES), None)
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return None if family is None else functools.partial(_run, module, family, names)


def _run(
    module: nn.Module,
    family: FamilyForward,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attention: AttentionFunction,
) -> Any:
    call = dict(zip(names, args, strict=False)) | kwargs
    return None if any(call.get(name) is not None for name in _OTHER_STATES) else family(module, call, attention)


# --- replacing the forward --------------------------------------------------------------------------------------------


def inline_forward(site: Site, current_pass: Callable[[nn.Module], RunningPass | None]) -> Callable[..., Any]:
    """Make a forward for the attention module of `site` that lets the current pass compute the attention.

    Args:
        current_pass: `attention_interface.current_pass`, passed here to avoid a circular import.
    """
    rewritten = rewritten_forward(site.module)
    assert rewritten is not None
    return functools.partial(_forward, site.module, site, rewritten, current_pass)


def _forward(
    module: nn.Module,
    first: Site,
    rewritten: RewrittenForward,
    current_pass: Callable[[nn.Module], RunningPass | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    current = current_pass(module)
    site = first if current is None else current.site_for_call(first)
    if current is None or not current.enters(site):
        return type(module).forward(module, *args, **kwargs)

    def attention(*parts: Any, **options: Any) -> Any:
        return current.attend(site, inline_attention, parts, options)

    output = rewritten(args, kwargs, attention)
    if output is None:
        raise UnsupportedModeError(
            f"{type(module).__name__} was called with encoder or query states; a prefix can only enter self-attention.",
            "Turn the prompt off for this forward with `softhooks.disabled(model)`.",
            given=", ".join(name for name in _OTHER_STATES if name in kwargs) or "positional arguments",
        )
    return output

"""Attention over a prefix that all rows share, computed once for all rows and merged with the attention over the text.

Attention over the prefix alone and over the text alone each give an output o_i, and the logarithm l_i of the sum of exponentiated
scores. With l = logaddexp(l_1, l_2), attention over both is o_1 exp(l_1 - l) + o_2 exp(l_2 - l), exactly. In the backward, the
kernel of each part gets the merged output and l, and gives the gradients of its keys and values; the gradients of the queries are
added. So no keys or values are copied for each row, and the prefix's gradients arrive summed over rows.

Merging of partial attentions is used for inference in Hydragen (arXiv:2402.05099).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.inject.prefix.key_values import KeyValues

_FORWARD, _BACKWARD = (
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}", None) for end in ("", "_backward")
)
"""The operators behind `scaled_dot_product_attention` on a CPU, which return l. They are private; None if torch has none."""

_FLASH = 1
"""What `torch._fused_sdp_choice` returns if `scaled_dot_product_attention` uses these operators."""

_TRAINED = 96
"""The number of virtual tokens from which merging is faster in training. Measured with 8 heads of size 32 and 9 of size 64."""

_PREFILLED = 64
"""The same for a forward of a whole text without gradients."""

_DECODED = 256
"""The same for one new token of each row, where the number of virtual tokens is multiplied by the number of rows."""


def can_merge(attention: AttentionFunction, prefix: KeyValues, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an attention function can be replaced by `merged_attention`, and whether that is faster.

    Args:
        args: module, query [B, Hq, T, D], key and value [B, Hk, K, D], mask, and any further arguments.
    """
    if torch.compiler.is_compiling():
        return False
    _, query, key, value, mask, *rest = args
    if prefix.variants != 1 or not _pays(prefix.length, query) or attention is not _sdpa():
        return False
    if rest or kwargs.get("dropout") or kwargs.get("position_bias") is not None:
        return False
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4 and not mask.requires_grad):
        return False
    return _is_plain() and _uses_flash(*cast_by_autocast(query, key, value))


@functools.cache
def _sdpa() -> AttentionFunction:
    """Return transformers' attention function for `scaled_dot_product_attention`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    function: AttentionFunction = sdpa_attention_forward
    return function


def _pays(length: int, query: Tensor) -> bool:
    batch, _, columns, _ = query.shape
    if torch.is_grad_enabled():
        return length >= _TRAINED
    return length >= _PREFILLED if columns > 1 else batch > 1 and length * batch >= _DECODED


def _is_plain() -> bool:
    """Whether neither `torch.func` nor forward-mode differentiation traces the call."""
    transforms = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    level = getattr(torch.autograd.forward_ad, "_current_level", None)
    return transforms is not None and transforms() is None and level is not None and level < 0


def _uses_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `scaled_dot_product_attention` would use the operators for these tensors."""
    if _FORWARD is None or _BACKWARD is None or query.device.type != "cpu":
        return False
    return bool(torch._fused_sdp_choice(query, key, value, None, 0.0, False, enable_gqa=True) == _FLASH)


def cast_by_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert queries, keys and values to the dtype to which autocast converts those of `scaled_dot_product_attention`."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def merged_attention(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    visible: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend to a prefix and a text.

    Args:
        prefix: the prefix's keys and values.
        text: the text's keys and values.
        mask: of the text, from `additive_mask`; None if each query sees the whole text (up to itself if `causal`).
        visible: of the prefix, from `joined_mask`; None if each query sees the whole prefix.
        scale: the factor of the scores; None for 1 / sqrt(D).

    Shape:
        query [B, Hq, T, D]; prefix [1, Hk, P, D] each; text [B, Hk, K, D] each; mask [B or 1, Hq or 1, T, K]; visible
        [1, 1, B * T, P] -> [B, Hq, T, D]
    """
    output: Tensor = _MergedAttention.apply(query, *prefix, *text, mask, visible, causal, scale)  # type: ignore[no-untyped-call]
    return output


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that adds the smallest finite number of `dtype` to the scores of hidden keys.

    For a query that sees none of the keys, l is then a very negative number, and the part gets the weight 0. With -inf, the
    operators would return l = 0.

    Args:
        mask: bool (True: seen), or additive.
        dtype: of the queries.
    """
    hidden = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, hidden)
    return mask.clamp(min=hidden).to(dtype)


def joined_mask(visible: Tensor, query: Tensor) -> Tensor:
    """Return the additive mask of the prefix for the joined queries. [B or 1, 1, T or 1, P] bool -> [1, 1, B * T, P]."""
    batch, _, columns, _ = query.shape
    return additive_mask(_join(visible.expand(batch, 1, columns, -1)), query.dtype)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        batch = len(query)
        output, log_sum = _FORWARD(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)  # type: ignore[misc]
        before = _FORWARD(_join(query), prefix_key, prefix_value, 0.0, False, attn_mask=visible, scale=scale)  # type: ignore[misc]
        log_before = _split(before[1], batch)
        weight = torch.sigmoid(log_before - log_sum)[..., None]  # exp(l_1 - l)
        merged = torch.lerp(output.to(weight.dtype), _split(before[0], batch).to(weight.dtype), weight).to(query.dtype)
        if any(ctx.needs_input_grad):
            log_both = torch.logaddexp(log_before, log_sum)
            ctx.save_for_backward(query, prefix_key, prefix_value, key, value, mask, visible, merged, log_both)
            ctx.causal, ctx.scale = causal, scale
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, prefix_key, prefix_value, key, value, mask, visible, merged, log_both = ctx.saved_tensors
        own = _BACKWARD(grad, query, key, value, merged, log_both, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)  # type: ignore[misc]
        before = _BACKWARD(  # type: ignore[misc]
            _join(grad),
            _join(query),
            prefix_key,
            prefix_value,
            _join(merged),
            _join(log_both),
            0.0,
            False,
            attn_mask=visible,
            scale=ctx.scale,
        )
        return own[0] + _split(before[0], len(grad)), before[1], before[2], own[1], own[2], None, None, None, None


def _join(rows: Tensor) -> Tensor:
    """Put all rows one after another. [B, H, T, ...] -> [1, H, B * T, ...]."""
    return rows.transpose(0, 1).flatten(1, 2)[None]


def _split(joined: Tensor, batch: int) -> Tensor:
    """Separate the rows again. [1, H, B * T, ...] -> [B, H, T, ...]."""
    rows: Tensor = joined[0].unflatten(1, (batch, -1))
    return rows.transpose(0, 1)

"""Add gated branches to decoders that do not use transformers' attention interface.

Prefixes enter these decoders through the cache, which receives keys and values only; a gated branch also needs the queries.
GPT-J, GPT-Neo, CodeGen and GPT-NeoX-Japanese compute attention in a method `_attn`, which is wrapped. For the families in
`inline.decoders`, the forward of the attention module is replaced; `attach` checks that both forwards return the same. Attention
over the text is computed by the same operations as without a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.forward_pass import AttentionFunction
from softhooks.backbone.inline.compare import agree, masked_inputs
from softhooks.backbone.inline.decoders import DECODERS
from softhooks.backbone.inline.rewritten_forward import argument_names, family_of, inline_forward
from softhooks.backbone.probing import FORWARD_ERRORS, are_close
from softhooks.backbone.stack import Site, Stack
from softhooks.backbone.stack_state import RunningPass
from softhooks.patching.patches import Patches

CurrentPass = Callable[[nn.Module], RunningPass | None]
"""`attention_interface.current_pass`, passed to the functions of this file to avoid a circular import."""

METHOD = "_attn"
"""The method that computes attention in some modules, from query, key, value and mask, with the output [B, Hq, T, D]."""


# --- methods ----------------------------------------------------------------------------------------------------------


def _method_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Any:
    """Compute attention with the module's own method. -> [B, T, Hq, D] and the weights."""
    output, weights = getattr(type(module), METHOD)(module, query, key, value, mask)
    return output.transpose(1, 2), weights


def _scaling(module: nn.Module, query: Tensor) -> float | None:
    """Return the factor of the scores in the module's method, or None if the method does not compute plain attention.

    The method is called on made-up tensors: the second of two tokens attends to both.

    Args:
        query: a query of the module, which tells the number of heads, their size and the device.
    """
    size = query.shape[1] * query.shape[3]
    made = torch.arange(1.0, 5 * size + 1, device=query.device).sin().reshape(1, query.shape[1], 5, query.shape[3])
    query, key, value = made[:, :, :1], made[:, :, 1:3], made[:, :, 3:]
    try:
        own, _ = _method_attention(module, query, key, value, None)
    except FORWARD_ERRORS:
        return None
    for scaling in (made.shape[3] ** -0.5, 1.0):
        plain = functional.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1) @ value
        if are_close(own, plain.transpose(1, 2)):
            return scaling
    return None


# --- finding and replacing --------------------------------------------------------------------------------------------


def find_scalings(stack: Stack, inputs: dict[str, Any]) -> None:
    """Run a stack whose attention is found through its cache, and set `Site.scaling` where a gated branch can enter.

    Args:
        inputs: `input_ids`, [1, T].
    """
    found: dict[nn.Module, set[float | None]] = {site.module: set() for site in stack.sites}
    options = {"use_cache": False} if "use_cache" in stack.parameters else {}
    with Patches() as patches:
        for module, scalings in found.items():
            if family_of(module, DECODERS) is not None:
                compare = functools.partial(_compare, scalings)
                patches.keep(module.register_forward_hook(compare, with_kwargs=True))
            elif hasattr(type(module), METHOD):
                patches.set(module, METHOD, functools.partial(_measure, scalings, module))
        for call in (inputs, masked_inputs(inputs)):
            stack.module(**call, **options)
    for site in stack.sites:
        site.scaling = next(iter(found[site.module]), None) if len(found[site.module]) == 1 else None


def _compare(
    scalings: set[float | None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
) -> None:
    """Compare the rewritten forward with the module's own, without and with dropout, and note the scaling."""
    seen: list[float] = []

    def attention(*parts: Any, function: AttentionFunction, **options: Any) -> Any:
        seen.append(options["scaling"])
        return function(*parts, **options)

    call = dict(zip(argument_names(module), args, strict=False)) | kwargs
    same = all(agree(module, call, training, attention) for training in (False, True))
    scalings.add(seen[0] if same and len(seen) == 2 else None)


def _measure(
    scalings: set[float | None],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
) -> Any:
    scalings.add(_scaling(module, query))
    return getattr(type(module), METHOD)(module, query, key, value, attention_mask)


def replace_attention(site: Site, current_pass: CurrentPass, patches: Patches) -> None:
    """Let the current pass compute the attention of a module for which `find_scalings` found the scaling."""
    if family_of(site.module, DECODERS) is not None:
        patches.set(site.module, "forward", inline_forward(site, current_pass))
    else:
        patches.set(site.module, METHOD, functools.partial(_attn, site.module, site, current_pass))


def _attn(
    module: nn.Module,
    site: Site,
    current_pass: CurrentPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
) -> Any:
    current = current_pass(module)
    if current is None or not current.enters(site):
        return getattr(type(module), METHOD)(module, query, key, value, attention_mask)
    parts, options = (module, query, key, value, attention_mask), {"scaling": site.scaling}
    output, weights = current.attend(site, _method_attention, parts, options)
    return output.transpose(1, 2), weights

"""Find the attention modules that a prefix can enter: through the attention interface, inline attention or a cache.

A `Site` stands for one such module in one layer; layers that share a module have a site each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.attention_interface import MARK, wrapped_functions
from softhooks.backbone.decoder_attention import find_scalings
from softhooks.backbone.inline.attention_function import inline_attention
from softhooks.backbone.inline.compare import compared_forwards, masked_inputs
from softhooks.backbone.inline.rewritten_forward import family_of
from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.recording_cache import RecordingCache
from softhooks.backbone.stack import Role, Site, Stack
from softhooks.backbone.windows import hides_distant, shortened_window
from softhooks.compat.cache_argument import cache_name, set_cache
from softhooks.patching.patches import Patches


@dataclass
class AttentionRecord:
    """One call to an attention function in a probe forward.

    Attributes:
        module: the attention module.
        key, value: the shapes of the keys and values, [B, Hk, K, D].
        hides_distant: whether the attention mask hides tokens outside a short window.
        queries: the number of queries, T.
        width: the query heads times their size, usually the width of the hidden states.
    """

    module: nn.Module
    key: torch.Size
    value: torch.Size
    hides_distant: bool = False
    queries: int = 0
    width: int = 0


def find_sites(stacks: list[Stack], ids: Tensor, attention: list[AttentionRecord] | None) -> None:
    """Run each stack, and set its `sites` and `injection`.

    Args:
        ids: [1, T]. A decoder gets all but the first id, so that it has fewer queries than there are encoder states.
        attention: the attention function calls, if the model has one stack and its calls are already recorded.
    """
    encoded: Tensor | None = None
    for stack in stacks:
        inputs = {"input_ids": ids}
        if encoded is not None:
            inputs = {"input_ids": ids[:, 1:], "encoder_hidden_states": encoded}
        if attention is None:
            with recorded_attention(stack.module) as records:
                encoded = last_hidden_state(stack.module(**inputs))
        else:
            inside = set(stack.module.modules())
            records = [record for record in attention if record.module in inside]
        stack.sites = make_sites(stack, records, ids.shape[1])
        if stack.sites:
            stack.injection = "attention"
            _find_windows(stack, inputs)
            continue
        stack.sites = make_sites(stack, _inline_records(stack, inputs), ids.shape[1])
        if stack.sites:
            stack.injection = "written_out"
        elif cache_name(stack.parameters) is not None and stack.causal:
            _find_cache_sites(stack, ids)


def make_sites(stack: Stack, records: list[AttentionRecord], encoded: int) -> list[Site]:
    """Make a `Site` for each attention call. In a decoder, a call whose number of keys is `encoded` is cross-attention."""
    sites: list[Site] = []
    shared: dict[int, list[Site]] = {}
    count: dict[Role, int] = {"self": 0, "cross": 0}
    for record in records:
        role: Role = "cross" if stack.name == "decoder" and record.key[2] == encoded else "self"
        site = Site(stack, role, count[role], record.module, record.key[1], record.key[3], record.value[3])
        site.shared_sites = shared.setdefault(id(record.module), [])
        site.shared_sites.append(site)
        sites.append(site)
        count[role] += 1
    return sites


# --- attention functions ----------------------------------------------------------------------------------------------


class _Recorder:
    """Records every attention call. One object acts as the site, its stack, the stack's state and the current pass."""

    check_attention = None

    def __init__(self, records: list[AttentionRecord]) -> None:
        self.stack = self.state = self.current = self
        self.records = records

    def site_for_call(self, site: Any) -> Any:
        return site

    def attend(self, _site: Any, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, query, key, value = args[:4]
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        self.records.append(
            AttentionRecord(
                module, key.shape, value.shape, hides_distant(mask), query.shape[2], query.shape[1] * query.shape[3]
            )
        )
        return attention(*args, **kwargs)


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[AttentionRecord]]:
    """Record every call to an attention function by the model's modules while the `with` block runs."""
    recorder = _Recorder([])
    with wrapped_functions(model.modules()) as patches:
        for part in model.modules():
            patches.set(part, MARK, recorder)
        yield recorder.records


def _find_windows(stack: Stack, inputs: dict[str, Tensor]) -> None:
    """Run a stack with a short sliding window, and set `is_windowed` for the sites whose masks then hide distant tokens."""
    with shortened_window(stack) as is_shortened:
        if not is_shortened:
            return
        with recorded_attention(stack.module) as records:
            stack.module(**inputs)
    for site, record in zip(stack.sites, records, strict=False):
        site.is_windowed = site.role == "self" and record.hides_distant


# --- inline attention -------------------------------------------------------------------------------------------------


def _inline_records(stack: Stack, inputs: dict[str, Tensor]) -> list[AttentionRecord]:
    """Run a stack, recompute each inline attention with the rewritten forward, and record that forward's attention calls.

    Returns:
        the calls, or an empty list if a result differs from the module's own: softhooks then does not support the module.
    """
    records: list[AttentionRecord] = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, function: Any = None, **kwargs: Any
    ) -> Any:
        records.append(AttentionRecord(module, key.shape, value.shape))
        return (function or inline_attention)(module, query, key, value, *args, **kwargs)

    if all(family_of(part) is None for part in stack.module.modules()):
        return []
    options = {"use_cache": False} if "use_cache" in stack.parameters else {}
    with compared_forwards(stack.module, attention) as differing:
        stack.module(**inputs, **options)
        found = list(records)
        if "attention_mask" in stack.parameters and not differing:
            stack.module(**masked_inputs(inputs), **options)
    return [] if differing else found


# --- caches -----------------------------------------------------------------------------------------------------------


def _find_cache_sites(stack: Stack, ids: Tensor) -> None:
    with _running_module(stack.module) as running:
        cache = RecordingCache(running)
        call = {"input_ids": ids, "use_cache": True}
        set_cache(call, cache, stack.parameters)
        try:
            stack.module(**call)
        except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError):
            return  # The model does not accept this cache, so it has no sites, and methods that need sites refuse it.
    for layer, (key, value) in sorted(cache.recorded.items()):
        site = Site(stack, "self", layer, cache.callers[layer], key.shape[1], key.shape[3], value.shape[3])
        site.shared_sites = [site]
        stack.sites.append(site)
    if stack.sites:
        stack.injection = "cache"
        find_scalings(stack, {"input_ids": ids})


@contextmanager
def _running_module(module: nn.Module) -> Iterator[Callable[[], nn.Module]]:
    """Yield a function that returns the innermost running module."""
    running: list[nn.Module] = []

    def end(*_: Any) -> None:
        running.pop()

    with Patches() as patches:
        for part in module.modules():
            patches.keep(part.register_forward_pre_hook(lambda part, _args: running.append(part)))
            patches.keep(part.register_forward_hook(end, always_call=True))
        yield lambda: running[-1]

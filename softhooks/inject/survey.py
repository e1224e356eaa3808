"""Find where keys and values can enter the stacks of a model: at the attention function, or through a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softhooks.anatomy import Role, Site, Stack, first_state
from softhooks.inject.caches import ListeningCache
from softhooks.inject.interface import MARK, close_interface, open_interface


def survey(stacks: list[Stack], ids: Tensor) -> None:
    """Fill in the sites of each stack by running it on [1, T] ids; a decoder gets the encoder's states and one id less."""
    encoded: Tensor | None = None
    for stack in stacks:
        inputs = {"input_ids": ids} if encoded is None else {"input_ids": ids[:, 1:], "encoder_hidden_states": encoded}
        noted, encoded = _listen_at_attention(stack, inputs)
        stack.sites = _sites(stack, noted, ids.shape[1])
        if stack.sites:
            stack.through = "attention"
        elif "past_key_values" in stack.parameters and stack.causal:
            _listen_at_cache(stack, ids)


class _Listener:
    """A site of no stack in particular, that notes who calls."""

    def __init__(self, noted: list[tuple[nn.Module, Tensor, Tensor]]) -> None:
        self.stack = self
        self.live = self
        self.noted = noted

    def attend(self, _site: Any, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, _query, key, value = args[:4]
        self.noted.append((module, key, value))
        return attention(*args, **kwargs)


def _listen_at_attention(
    stack: Stack, inputs: dict[str, Tensor]
) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Tensor]:
    """Run a stack and note which modules called the attention function, with which keys and values."""
    noted: list[tuple[nn.Module, Tensor, Tensor]] = []
    listener = _Listener(noted)
    parts = list(stack.module.modules())
    open_interface(listener, parts)
    try:
        for part in parts:
            part.__dict__[MARK] = listener
        return noted, first_state(stack.module(**inputs))
    finally:
        for part in parts:
            part.__dict__.pop(MARK, None)
        close_interface(listener)


def _sites(stack: Stack, noted: list[tuple[nn.Module, Tensor, Tensor]], encoded: int) -> list[Site]:
    """Turn the calls into sites. In a decoder beside an encoder, as many keys as encoder states mean cross-attention."""
    sites: list[Site] = []
    seen: set[int] = set()
    count: dict[Role, int] = {"self": 0, "cross": 0}
    for module, key, value in noted:
        if id(module) in seen:
            continue
        seen.add(id(module))
        is_cross = stack.name == "decoder" and key.shape[2] == encoded
        role: Role = "cross" if is_cross else "self"
        sites.append(Site(stack, role, count[role], module, key.shape[1], key.shape[3], value.shape[3]))
        count[role] += 1
    return sites


def _listen_at_cache(stack: Stack, ids: Tensor) -> None:
    cache = ListeningCache()
    try:
        stack.module(input_ids=ids, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError):
        return  # A model that takes no foreign cache has no sites; methods that need them refuse it by name.
    for layer in sorted(cache.heard):
        key, value = cache.heard[layer]
        stack.sites.append(Site(stack, "self", layer, None, key.shape[1], key.shape[3], value.shape[3]))
    if stack.sites:
        stack.through = "cache"

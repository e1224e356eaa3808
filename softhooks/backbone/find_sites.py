"""Find where keys and values can enter the stacks of a model: at an attention function, in attention written out, by a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.attention_interface import MARK, close_interface, files_of, open_interface
from softhooks.backbone.inline_attention import is_replaced, known, written_out_attention
from softhooks.backbone.listening_cache import ListeningCache
from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.stack import Role, Site, Stack
from softhooks.backbone.windows import SHORT, hides_distant, short_window


@dataclass
class _Heard:
    """One call of attention in a probe: who called, and the shapes of keys and values, [B, Hk, K, D]."""

    module: nn.Module
    key: torch.Size
    value: torch.Size
    hides_distant: bool = False


def survey(stacks: list[Stack], ids: Tensor) -> None:
    """Fill in the sites of each stack by running it on [1, T] ids; a decoder gets the encoder's states and one id less."""
    encoded: Tensor | None = None
    for stack in stacks:
        inputs = {"input_ids": ids} if encoded is None else {"input_ids": ids[:, 1:], "encoder_hidden_states": encoded}
        heard, encoded = _listen_at_attention(stack, inputs)
        stack.sites = _sites(stack, heard, ids.shape[1])
        if stack.sites:
            stack.through = "attention"
            _note_windows(stack, inputs)
            continue
        stack.sites = _sites(stack, _listen_at_written_out(stack, inputs), ids.shape[1])
        if stack.sites:
            stack.through = "written_out"
        elif "past_key_values" in stack.parameters and stack.causal:
            _listen_at_cache(stack, ids)


class _Listener:
    """A site of no stack in particular, that notes who calls."""

    def __init__(self, heard: list[_Heard]) -> None:
        self.stack = self.state = self.current = self
        self.heard = heard

    def turn(self, site: Any) -> Any:
        return site

    def attend(self, _site: Any, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, _query, key, value = args[:4]
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        self.heard.append(_Heard(module, key.shape, value.shape, hides_distant(mask)))
        return attention(*args, **kwargs)


def _listen_at_attention(stack: Stack, inputs: dict[str, Tensor]) -> tuple[list[_Heard], Tensor]:
    """Run a stack and note which modules called the attention function, with which keys and values."""
    heard: list[_Heard] = []
    listener = _Listener(heard)
    parts = list(stack.module.modules())
    open_interface(listener, files_of(parts))
    try:
        for part in parts:
            part.__dict__[MARK] = listener
        return heard, last_hidden_state(stack.module(**inputs))
    finally:
        for part in parts:
            part.__dict__.pop(MARK, None)
        close_interface(listener)


def _sites(stack: Stack, heard: list[_Heard], encoded: int) -> list[Site]:
    """Turn the calls into sites. In a decoder beside an encoder, as many keys as encoder states mean cross-attention."""
    sites: list[Site] = []
    turns: dict[int, list[Site]] = {}
    count: dict[Role, int] = {"self": 0, "cross": 0}
    for call in heard:
        is_cross = stack.name == "decoder" and call.key[2] == encoded
        role: Role = "cross" if is_cross else "self"
        site = Site(stack, role, count[role], call.module, call.key[1], call.key[3], call.value[3])
        site.turns = turns.setdefault(id(call.module), [])
        site.turns.append(site)
        sites.append(site)
        count[role] += 1
    return sites


def _note_windows(stack: Stack, inputs: dict[str, Tensor]) -> None:
    """Run a stack whose config has windows with a short one, and note the sites whose masks follow."""
    config = short_window(stack)
    if config is None:
        return
    window, config.sliding_window = config.sliding_window, SHORT
    try:
        heard, _ = _listen_at_attention(stack, inputs)
    finally:
        config.sliding_window = window
    for site, call in zip(stack.sites, heard, strict=False):
        site.is_windowed = site.role == "self" and call.hides_distant


# --- attention that is written out ------------------------------------------------------------------------------------


def _listen_at_written_out(stack: Stack, inputs: dict[str, Tensor]) -> list[_Heard]:
    """Run a stack, follow the recipe of each attention module beside its own forward, and note what the recipes see.

    Nothing is noted if one of them does not give what the module gives: this version of it is written otherwise.
    """
    heard: list[_Heard] = []
    differing: list[nn.Module] = []

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        heard.append(_Heard(module, key.shape, value.shape))
        return written_out_attention(module, query, key, value, *args, **kwargs)

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        own = known(module)
        try:
            said = None if own is None or is_replaced(module) else own.follow(module, args, kwargs, note)
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
            said = None
        if said is None or not _equal(last_hidden_state(said), last_hidden_state(output)):
            differing.append(module)

    handles = [
        part.register_forward_hook(compare, with_kwargs=True)
        for part in stack.module.modules()
        if known(part) is not None
    ]
    try:
        if handles:
            stack.module(**inputs, **({"use_cache": False} if "use_cache" in stack.parameters else {}))
    finally:
        for handle in handles:
            handle.remove()
    return [] if differing else heard


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    scale = theirs.float().abs().amax().clamp(min=1e-6)
    difference = (ours.float() - theirs.float()).abs().amax()
    return bool(difference <= 200 * torch.finfo(theirs.dtype).eps ** 0.9 * scale)


# --- caches -----------------------------------------------------------------------------------------------------------


def _listen_at_cache(stack: Stack, ids: Tensor) -> None:
    with _who_runs(stack.module) as running:
        cache = ListeningCache(running)
        try:
            stack.module(input_ids=ids, past_key_values=cache, use_cache=True)
        except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError):
            return  # A model that takes no foreign cache has no sites; methods that need them refuse it by name.
    for layer in sorted(cache.heard):
        key, value = cache.heard[layer]
        stack.sites.append(Site(stack, "self", layer, cache.callers[layer], key.shape[1], key.shape[3], value.shape[3]))
    if stack.sites:
        stack.through = "cache"


@contextmanager
def _who_runs(module: nn.Module) -> Iterator[Callable[[], nn.Module]]:
    """Tell, at any moment of a forward, which module is running innermost."""
    running: list[nn.Module] = []
    handles = []
    for part in module.modules():
        handles.append(part.register_forward_pre_hook(lambda part, _args: running.append(part)))
        handles.append(part.register_forward_hook(lambda *_: _none(running.pop()), always_call=True))
    try:
        yield lambda: running[-1]
    finally:
        for handle in handles:
            handle.remove()


def _none(_: Any) -> None:
    return None

"""Key-value prefixes through a read-only cache, for stacks that do not use transformers' attention interface."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from softhooks.backbone.stack import Site, Stack
from softhooks.compat.cache_argument import NAMES, cache_in, set_cache
from softhooks.errors import UnsupportedModeError
from softhooks.inject.checkpointing import CacheFlag, replace_once
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.prefix_cache import PrefixCache, PrefixPair, key_order
from softhooks.inject.prefix.prefix_pass import PrefixPass

_BY_COLUMN = ("attention_mask", "alibi")
"""The arguments of a layer whose last dimension has one entry for each key."""

_KEEPS_CACHE = "_can_checkpoint_with_cache"
"""The flag of transformers' layers that keep the cache when they are checkpointed."""


class CachePass(PrefixPass):
    """A forward with a cache that puts the prefix before the contents of the caller's cache.

    Args:
        call: the arguments of the forward; the cache and the mask are replaced in place.
        shape: the batch size and the length of the text, including padding.
    """

    keeps_cache = True

    def __init__(self, stack: Stack, prefix: KeyValues, call: dict[str, Any], shape: tuple[int, int]) -> None:
        super().__init__(stack, {"self": prefix}, None, stack.module.training)
        inner = cache_in(call)
        self._past = 0 if inner is None else int(inner.get_seq_length())
        crosses = call.get("encoder_hidden_states") is not None
        if inner is None and self._wants_cache(call):
            config: Any = self.stack.module.config
            inner = DynamicCache(config=config)
            if crosses:
                inner = EncoderDecoderCache(inner, DynamicCache(config=config))
        self.inner = inner
        own = inner.self_attention_cache if isinstance(inner, EncoderDecoderCache) else inner
        self._order = key_order(call.get("attention_mask"), self.prefixes["self"].length)
        self.prefixed = PrefixCache(self.prefixes["self"], own, self._order)
        crosses = crosses or own is not inner
        self.cache = PrefixPair(self.prefixed, inner) if crosses else self.prefixed
        set_cache(call, self.cache, self.stack.parameters)
        call["attention_mask"] = self._widen_mask(call.get("attention_mask"), shape)
        self._keep_cache_in_checkpoints()

    def enters(self, site: Site) -> bool:
        """Return False: the prefix is in the cache, so the attention function must not be changed."""
        return False

    def narrowed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remove the prefix's columns from the mask that a layer without a prefix shares with the other layers."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        call = dict(zip(names, args, strict=False)) | kwargs
        narrowed = {name: self._own(call[name]) for name in _BY_COLUMN if isinstance(call.get(name), Tensor)}
        return (), {**call, **narrowed}

    def _own(self, tensor: Tensor) -> Tensor:
        """Select the text's columns from the last dimension of a tensor."""
        return tensor[..., self.prefixes["self"].length :] if self._order is None else self._order.own(tensor)

    def _wants_cache(self, call: dict[str, Any]) -> bool:
        asked = call.get("use_cache")
        if self._checkpointed:  # a checkpointed layer runs twice, and must not write to a cache twice
            return False
        return bool(getattr(self.stack.module.config, "use_cache", False) if asked is None else asked)

    def _keep_cache_in_checkpoints(self) -> None:
        """Keep transformers from removing the cache from the arguments of checkpointed layers."""
        for module in self._checkpointed:
            if not hasattr(module, _KEEPS_CACHE):
                if module is self.stack.module:
                    continue
                raise UnsupportedModeError(
                    f"{type(module).__name__} does not use a cache with gradient checkpointing, but a prefix can enter it only "
                    "through a cache.",
                    "Disable gradient checkpointing.",
                )
            replace_once(self.stack, module, _KEEPS_CACHE, CacheFlag)

    def _widen_mask(self, mask: Any, shape: tuple[int, int]) -> Any:
        """Add the prefix's columns to the caller's mask."""
        prefix = self.prefixes["self"]
        if prefix.missing:
            raise UnsupportedModeError(
                f"layers {sorted(prefix.missing)} have no prefix in some rows; if prefixes enter through a cache, all prompts "
                "of a batch must enter the same layers.",
                "Run the rows of each prompt in a separate batch.",
                model=type(self.stack.module).__name__,
            )
        device = prefix.any_key.device
        present = prefix.present(device)
        if mask is None:
            if present is None:
                return None
            mask = torch.ones(shape[0], self._past + shape[1], dtype=torch.long, device=device)
        if present is None:
            present = torch.ones(mask.shape[0], prefix.length, dtype=torch.bool, device=mask.device)
        if mask.dim() == 2:
            wide = torch.cat([present.to(mask.dtype).expand(mask.shape[0], -1), mask], dim=-1)
            return wide if self._order is None else self._order.arrange(wide, 1)
        seen = present[:, None, None, :].expand(mask.shape[0], mask.shape[1], mask.shape[2], -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([seen, mask], dim=-1)

    def leave(self, output: Any) -> Any:
        """Put the caller's cache back into the output, and remove the prefix's columns from the attentions."""
        self.has_injected = self.prefixed.has_injected
        if isinstance(output, tuple):
            items = [self.inner if item is self.cache else self._strip(item) for item in output]
            return tuple(item for item in items if item is not None)
        name = next((name for name in NAMES if output.get(name) is not None), None)
        if name is not None:
            output[name] = self.inner
        if output.get("attentions") is not None:
            output["attentions"] = self._strip(output["attentions"])
        return output

    def _strip(self, value: Any) -> Any:
        """Remove the prefix's columns from a tuple of attentions, [B, Hq, T, P + K] each; return anything else unchanged."""
        if not isinstance(value, tuple) or not all(isinstance(item, Tensor) and item.dim() == 4 for item in value):
            return value
        prefix = self.prefixes["self"]
        without = [number for number, site in enumerate(self.stack.sites) if site.index not in prefix.keys]
        return tuple(weights if number in without else self._own(weights) for number, weights in enumerate(value))


@dataclass(eq=False)
class NarrowHook:
    """The hook of one attention module of a stack whose prefixes enter through a cache."""

    site: Site

    def narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Remove the prefix's columns from the module's mask, if a prefix is running that this layer does not have."""
        current = self.site.stack.state.current
        if isinstance(current, CachePass) and self.site.index not in current.prefixes["self"].keys:
            return current.narrowed(module, args, kwargs)
        return None


def hook_masks(stack: Stack) -> list[RemovableHandle]:
    """Register a `NarrowHook` on the attention modules of a stack, if prefixes enter it through a cache."""
    if stack.injection != "cache":
        return []
    return [site.module.register_forward_pre_hook(NarrowHook(site).narrow, with_kwargs=True) for site in stack.sites]

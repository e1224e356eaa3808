"""A prefix through a read-only cache: the pass for stacks without the attention interface."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from softhooks.backbone.stack import Stack
from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.left_padding import key_order
from softhooks.inject.prefix.prefix_cache import PrefixCache, PrefixPair
from softhooks.inject.prefix.prefix_pass import PrefixPass

_BY_COLUMN = ("attention_mask", "alibi")
"""What a layer is given for each column that it may attend to, in the last dimension."""


class CachePass(PrefixPass):
    """Give the stack a cache that puts the prefix before what the caller's cache holds.

    Args:
        stack: the stack.
        prefix: keys and values by layer.
        call: the arguments of the forward; cache and mask are replaced in place.
        shape: batch and columns of the text.
    """

    def __init__(self, stack: Stack, prefix: KeyValues, call: dict[str, Any], shape: tuple[int, int]) -> None:
        self._kept: list[nn.Module] = []
        super().__init__(stack, {"self": prefix}, None, stack.module.training)
        try:
            self._enter(call, shape)
        except BaseException:
            self.close()
            raise

    def _enter(self, call: dict[str, Any], shape: tuple[int, int]) -> None:
        inner = call.get("past_key_values")
        self._past = 0 if inner is None else int(inner.get_seq_length())
        crosses = call.get("encoder_hidden_states") is not None
        if inner is None and self._wants_cache(call):
            config: Any = self.stack.module.config
            inner = DynamicCache(config=config)
            if crosses:
                inner = EncoderDecoderCache(inner, DynamicCache(config=config))
        self.inner = inner
        own = inner.self_attention_cache if isinstance(inner, EncoderDecoderCache) else inner
        self._behind = key_order(call.get("attention_mask"), self.prefixes["self"].length)
        self.prefixed = PrefixCache(self.prefixes["self"], own, self._behind)
        crosses = crosses or own is not inner
        self.cache = PrefixPair(self.prefixed, inner) if crosses else self.prefixed
        call["past_key_values"] = self.cache
        call["attention_mask"] = self._widened(call.get("attention_mask"), shape)
        self._keep_cache_in_checkpoints()
        self.handles += self.prepare()

    def prepare(self) -> list[Any]:
        """Take the prefix's columns, which all layers are given, out of the masks of the layers that have no prefix."""

        def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            call = dict(zip(names, args, strict=False)) | kwargs
            narrowed = {name: self._own(call[name]) for name in _BY_COLUMN if isinstance(call.get(name), Tensor)}
            return (), {**call, **narrowed}

        bare = [site for site in self.stack.sites if site.index not in self.prefixes["self"].keys]
        return [site.module.register_forward_pre_hook(narrow, with_kwargs=True) for site in bare]

    def _own(self, tensor: Tensor) -> Tensor:
        """Take the prefix's columns out of the last dimension."""
        return tensor[..., self.prefixes["self"].length :] if self._behind is None else self._behind.own(tensor)

    def _wants_cache(self, call: dict[str, Any]) -> bool:
        asked = call.get("use_cache")
        if self._replaced:  # a checkpointed layer must not write to a cache twice
            return False
        return bool(getattr(self.stack.module.config, "use_cache", False) if asked is None else asked)

    def _keep_cache_in_checkpoints(self) -> None:
        """Let checkpointed layers keep the read-only cache, which they would otherwise be denied."""
        for module, _ in self._replaced:
            if not hasattr(module, "_can_checkpoint_with_cache"):
                if module is self.stack.module:
                    continue
                raise UnsupportedModeError(
                    "a prefix that enters through a cache needs layers that keep a read-only cache when checkpointed.",
                    "Turn gradient checkpointing off.",
                    layer=type(module).__name__,
                )
            module._can_checkpoint_with_cache = True  # type: ignore[assignment]
            self._kept.append(module)

    def _widened(self, mask: Any, shape: tuple[int, int]) -> Any:
        """Put the prefix's columns before those of the caller's mask."""
        prefix = self.prefixes["self"]
        if prefix.bare:
            raise UnsupportedModeError(
                "in a model whose prefixes enter through a cache, the prompts of one batch must enter the same layers.",
                "Run their rows in batches of their own.",
                model=type(self.stack.module).__name__,
                layers=f"{sorted(prefix.bare)} have no prefix in some rows",
            )
        device = prefix.any_key.device
        present = prefix.present(device)
        if mask is None:
            if present is None:
                return None
            mask = torch.ones(shape[0], self._past + shape[1], dtype=torch.long, device=device)
        seen = (
            torch.ones(mask.shape[0], prefix.length, dtype=torch.bool, device=mask.device)
            if present is None
            else present
        )
        if mask.dim() == 2:
            wide = torch.cat([seen.to(mask.dtype).expand(mask.shape[0], -1), mask], dim=-1)
            return wide if self._behind is None else self._behind.arrange(wide, 1)
        seen = seen[:, None, None, :].expand(mask.shape[0], mask.shape[1], mask.shape[2], -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([seen, mask], dim=-1)

    def leave(self, output: Any) -> Any:
        """Hand the caller's cache back, and the attentions without the prefix's columns."""
        self.touched = self.prefixed.touched
        if isinstance(output, tuple):
            items = [self.inner if item is self.cache else self._bring(item) for item in output]
            return tuple(item for item in items if item is not None)
        if output.get("past_key_values") is not None:
            output["past_key_values"] = self.inner
        if output.get("attentions") is not None:
            output["attentions"] = self._bring(output["attentions"])
        return output

    def _bring(self, value: Any) -> Any:
        """Strip a tuple of attentions, [B, Hq, T, P + K] for each site that has a prefix; leave everything else."""
        if not isinstance(value, tuple) or not all(isinstance(item, Tensor) and item.dim() == 4 for item in value):
            return value
        prefix = self.prefixes["self"]
        bare = [place for place, site in enumerate(self.stack.sites) if site.index not in prefix.keys]
        return tuple(weights if place in bare else self._own(weights) for place, weights in enumerate(value))

    def close(self) -> None:
        """Take back what the checkpointed layers were told."""
        super().close()
        for module in self._kept:
            module.__dict__.pop("_can_checkpoint_with_cache", None)
        self._kept.clear()

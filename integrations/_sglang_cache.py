"""The prefix cache that SGLang creates for `--radix-cache-backend softhooks`. Importing this module imports SGLang."""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from softhooks.errors import CheckpointError, PromptTooLongError
from softhooks.integration_support.serving import FoundPrefix, PromptFolder
from softhooks.integrations._sglang_requests import PLACEHOLDER, salt_of
from softhooks.integrations._sglang_settings import prompt_folder, require_model, require_options, served_model


class SoftPromptCache(UnifiedRadixCache):
    """A prefix cache that holds the keys and values of prompts as if they had been computed from P placeholder ids.

    The entries are in a part of the cache that only requests with the prompt's salt search, and they are locked, so that SGLang
    never evicts them. Flushing the cache removes them; the next request brings its prompt back.
    """

    def __init__(self, params: Any) -> None:
        self._held: dict[str, Any] = {}  # the lock of each prompt that is in the cache, by salt
        self._known: dict[str, FoundPrefix] = {}
        self.folder: PromptFolder
        self.model: Any
        super().__init__(params)

    def reset(self) -> None:
        """Empty the cache; SGLang empties the pool of keys and values too."""
        super().reset()
        self._held.clear()

    def admit(self, name: object, salt: str | None) -> None:
        """Put the prompt of a new request into the cache, if it is not there.

        Raises:
            SoftHooksError: the prompt's file was deleted, damaged or replaced since the server accepted the request, or there
                is no room for it.
        """
        if salt not in self._known:
            found = self.folder.find(name)
            served_model(self.model).require_fit(found)
            if salt != salt_of(found):
                raise CheckpointError(
                    f"the file of the prompt {found.name!r} was replaced after the server accepted the request.",
                    "Send the request again.",
                )
            self._known[salt_of(found)] = found
        self._hold(str(salt))

    def match_prefix(self, params: Any) -> Any:
        """Find the longest cached prefix of a request, which contains its prompt."""
        found = self._known.get(params.key.cache_salt)
        if found is None:
            return super().match_prefix(params)
        self._hold(params.key.cache_salt)  # the cache may have been flushed while the request waited
        result = super().match_prefix(params)
        if result.device_prefix_len < min(found.prefix.facts.num_virtual_tokens, len(params.key)):
            raise RuntimeError(f"the prompt {found.name!r} is not in the cache, so that the answer would be wrong")
        return result

    def _hold(self, salt: str) -> None:
        if salt in self._held:
            return
        found = self._known[salt]
        count, allocator = found.prefix.facts.num_virtual_tokens, self.token_to_kv_pool_allocator
        if allocator.available_size() < count:
            evict_from_tree_cache(self, count)
        slots = allocator.alloc(count)
        if slots is None:
            raise PromptTooLongError(
                f"the cache has no room for the {count} virtual tokens of the prompt {found.name!r} beside the running requests.",
                "Send the request again later, or start SGLang with a larger `--mem-fraction-static`.",
            )
        pool = allocator.get_kvcache()
        for layer, (key, value) in enumerate(zip(found.prefix.keys, found.prefix.values, strict=True)):
            pair = (tensor.to(pool.device, pool.dtype) for tensor in (key, value))
            pool.set_kv_buffer(None, slots, *pair, layer_id_override=layer)
        key = RadixKey(array("q", [PLACEHOLDER] * count), cache_salt=salt)
        self.insert(InsertParams(key=key, value=slots))
        node = super().match_prefix(MatchPrefixParams(key=key)).last_device_node
        self._held[salt] = self.lock(node)


def create(context: Any) -> SoftPromptCache:
    """Create the cache for a scheduler, with all prompts in the directory.

    Raises:
        SoftHooksError: the model, an option or a prompt cannot be served.
    """
    folder = prompt_folder()
    require_model(context.model_config)
    pool = context.params.token_to_kv_pool_allocator.get_kvcache()
    require_options(resolving_view(context.server_args), pool, context.is_hybrid_swa)
    cache: SoftPromptCache = create_unified_radix_cache(context, cache_class=SoftPromptCache)
    cache.folder, cache.model = folder, context.model_config
    for found in folder.read_all():
        cache.admit(found.name, salt_of(found))
    return cache

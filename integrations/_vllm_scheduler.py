"""The part of the KV connector that runs in vLLM's scheduler: it gives the requests virtual tokens, and plans what to write.

A request that names a prompt gets P placeholders before its text, whose keys and values count as already computed elsewhere. The
placeholders repeat the text's first id, so that penalties for repeated tokens see the same set of ids. The digest of the prefix
enters the hashes of the request's blocks, so that only requests with the same prompt share them.
"""

from __future__ import annotations

import logging
from typing import Any

from softhooks.errors import SoftHooksError
from softhooks.integration_support.serving import FoundPrefix, Prefix, PromptFolder
from softhooks.integrations._vllm_plan import Step, Write

_log = logging.getLogger(__name__)

FIELD = "soft_prompt"
"""The field of `kv_transfer_params` that names a request's prompt."""


def name_in(params: object) -> object:
    """Return the prompt that `kv_transfer_params` names, or None."""
    return params.get(FIELD) if isinstance(params, dict) else None


class PrefixScheduler:
    """Give requests their virtual tokens, and plan the writes of each step.

    Args:
        folder: the prompts.
        block_sizes: the number of tokens in a block of the cache, for each group of layers.
    """

    def __init__(self, folder: PromptFolder, block_sizes: list[int]) -> None:
        self.folder = folder
        self.block_sizes = block_sizes
        self.prompts: dict[str, FoundPrefix | None] = {}  # by request id; None if the prompt is lost
        self.sent: set[str] = set()
        self.step = Step(added={found.digest: found.prefix for found in folder.read_all()})

    def admit(self, request: Any) -> None:
        """Put a new request's virtual tokens before its text; a request that names no prompt stays unchanged."""
        name = name_in(request.kv_transfer_params)
        if name is None:
            return
        try:
            found = self.folder.find(name)
        except SoftHooksError as error:
            # The server has just accepted the name, so the file was deleted or damaged since.
            _log.error("request %s cannot be served: %s", request.request_id, error)
            self.prompts[request.request_id] = None
            return
        self.prompts[request.request_id] = found
        ids = request.prompt_token_ids
        placeholders = [ids[0]] * found.prefix.facts.num_virtual_tokens
        request.prompt_token_ids = [*placeholders, *ids]
        request._all_token_ids[:0] = placeholders
        request.num_prompt_tokens += len(placeholders)
        request.cache_salt = f"softhooks {found.digest} {request.cache_salt or ''}"
        request.block_hashes = []
        request.update_block_hashes()

    def num_new_tokens(self, request: Any, num_computed: int) -> tuple[int, bool]:
        """Return how many virtual tokens have to be written, and whether the request has to wait for them.

        Args:
            num_computed: the number of tokens at the request's start that are in the cache already.
        """
        if request.request_id not in self.prompts:
            return 0, False
        found = self.prompts[request.request_id]
        if found is None:
            return 1, True  # a request that waits is one that a worker can report as failed
        return max(found.prefix.facts.num_virtual_tokens - num_computed, 0), False

    def plan(self, request: Any, blocks: Any, num_external: int) -> None:
        """Plan the writes for a request that has got its blocks.

        Args:
            blocks: `blocks.blocks` has the blocks of each group of layers.
            num_external: the number of virtual tokens to write, the last ones of the prefix.
        """
        if not num_external or request.request_id not in self.prompts:
            return
        found = self.prompts[request.request_id]
        if found is None:
            self.step.failed.append(request.request_id)
            return
        end = found.prefix.facts.num_virtual_tokens
        start = end - num_external
        slots = [
            [_slot(group, size, position) for position in range(start, end)]
            for group, size in zip(blocks.blocks, self.block_sizes, strict=True)
        ]
        self.step.writes.append(Write(found.digest, start, slots))
        self._send(found.digest, found.prefix)

    def take_step(self) -> Step:
        """Return what the workers have to do in this step, and begin the plan of the next."""
        step, self.step = self.step, Step()
        self.sent |= set(step.added)
        return step

    def finish(self, request_id: str) -> None:
        """Forget a request, and the prefixes that nothing needs any more."""
        if request_id not in self.prompts:
            return
        del self.prompts[request_id]
        needed = self.folder.digests() | {found.digest for found in self.prompts.values() if found is not None}
        dropped = self.sent - needed - {write.digest for write in self.step.writes}
        self.step.dropped += sorted(dropped)
        self.sent -= dropped

    def _send(self, digest: str, prefix: Prefix) -> None:
        if digest not in self.sent:
            self.step.added[digest] = prefix


def _slot(blocks: Any, size: int, position: int) -> int:
    block = blocks[position // size]
    return -1 if block.is_null else block.block_id * size + position % size

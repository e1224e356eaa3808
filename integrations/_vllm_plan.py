"""What the scheduler of vLLM tells its workers in each step: which prefixes to write to which blocks of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from softhooks.integration_support.serving import Prefix


@dataclass
class Write:
    """The part of a prefix to write to the cache for one request.

    Attributes:
        digest: the prefix.
        start: the first position to write; those before it were found in the cache.
        slots: for each group of layers, the slot in the cache of each position from `start`, or -1 if the group does not keep it
            (a layer with a sliding window keeps only the positions that its window can still reach).
    """

    digest: str
    start: int
    slots: list[list[int]]


@dataclass
class Step:
    """The work of the workers in one step.

    Attributes:
        added: prefixes that the workers do not have yet, by digest.
        dropped: the digests of prefixes that no request needs any more.
        failed: the ids of requests that cannot be served.
    """

    added: dict[str, Prefix] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

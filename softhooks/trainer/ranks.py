"""Make a prompt identical on all ranks of distributed training, and check that it stays identical."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from softhooks.base_model.frozen_record import FrozenRecord, digest
from softhooks.compat.sharding import is_sharded_model
from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt
from softhooks.saving.live_state import live_tensors

logger = logging.getLogger(__name__)


def is_single_process() -> bool:
    """Whether training runs in a single process."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def broadcast_from_rank_0(prompt: SoftPrompt, device: torch.device) -> None:
    """Copy the prompt, and tensors of the base that differ (such as a randomly initialized head), from rank 0 to every rank.

    Otherwise, DDP would copy them later, and the frozen check would report a changed base; FSDP2 would combine shards of
    different prompts.

    Args:
        device: the device on which the processes exchange tensors.

    Raises:
        TrainerError: the ranks have different methods or models.
    """
    if is_single_process() or is_sharded_model(prompt.model):
        return
    prompted = prompt.prompted_model
    tensors = {**dict(prompt.model.named_parameters()), **dict(prompt.model.named_buffers()), **live_tensors(prompt)}
    shapes = {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
    _require_equal({"method": repr(prompt.method), **shapes}, "method or model")
    known = {} if prompted.record is None else prompted.record.digests
    mine = {name: known[name].bits if name in known else digest(tensor).bits for name, tensor in tensors.items()}
    theirs = _from_rank_0(mine)
    here = sorted(name for name in mine if mine[name] != theirs[name])
    anywhere = sorted({name for names in _from_all_ranks(here) for name in names})
    with torch.no_grad():
        for name in anywhere:
            shared = tensors[name].detach().to(device).contiguous()
            distributed.broadcast(shared, src=0)
            if name in here:
                tensors[name].copy_(shared)
    if any(name in known for name in here):
        prompted.record = FrozenRecord(prompt.model)
    if anywhere:
        logger.info("copied %d tensors from rank 0 to the ranks where they differed: %s", len(anywhere), anywhere[:8])


def require_same_on_all_ranks(prompt: SoftPrompt) -> None:
    """Check that all ranks have the same prompt, unless it is sharded."""
    if is_single_process() or is_sharded_model(prompt.model):
        return
    _require_equal({name: digest(tensor).bits for name, tensor in live_tensors(prompt).items()}, "prompt")


def _require_equal(mine: dict[str, str], what: str) -> None:
    """Compare values with those of rank 0. If any rank differs, every rank raises an error, so that no rank waits for another."""
    theirs = _from_rank_0(mine)
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    example = {name: (mine.get(name), theirs.get(name)) for name in differing[:1]}
    reports: Sequence[tuple[list[str], dict[str, Any]]] = _from_all_ranks((differing[:8], example))
    for rank, (names, values) in enumerate(reports):
        if names:
            own, first = values[names[0]]
            raise TrainerError(
                f"the {what} of rank {rank} differs from that of rank 0; it must be the same on all ranks.",
                "Give every rank the same script, files and checkpoint, and do not change parameters on only one rank.",
                differing=", ".join(names),
                rank_0=f"{names[0]}: {first}",
                **{f"rank_{rank}": f"{names[0]}: {own}"},
            )


def _from_rank_0(value: Any) -> Any:
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _from_all_ranks(value: Any) -> list[Any]:
    box: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(box, value)
    return box

"""What several processes need: a launch that can train a prompt, and one prompt on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from softhooks.base_model.digest import FrozenRecord, digest
from softhooks.base_model.frozen_names import frozen_names
from softhooks.checks.injection import choose_injection
from softhooks.compat.sharding import shards
from softhooks.errors import TrainerError
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.runtime.unused_parameters import REMEDY, RULE
from softhooks.saving.state_dict import live_tensors

logger = logging.getLogger(__name__)


def fsdp_plugin() -> Any:
    """The plugin with which accelerate shards models, in a Trainer's process; None where it does not."""
    from accelerate.state import AcceleratorState, is_initialized

    return getattr(AcceleratorState(), "fsdp_plugin", None) if is_initialized() else None


# --- the launch -------------------------------------------------------------------------------------------------------


def check_launch(args: TrainingArguments, model: nn.Module, method: Method) -> None:
    """Refuse, before anything is attached, what would train a prompt wrongly without a word.

    Raises:
        TrainerError: DataParallel, DeepSpeed, FSDP 1, weights on one rank only, checkpoints in shards, a model that is sharded
            already; where parameters have no part in some steps, a DDP that does not look for them, or FSDP2 that saves an
            optimizer.
    """
    for found, rule, remedy in _obstacles(args, model):
        raise TrainerError(rule, remedy, found=found)
    if args.world_size > 1 and method.has_idle(method.columns):
        _check_idle(args, method)


def _check_idle(args: TrainingArguments, method: Method) -> None:
    if fsdp_plugin() is None:
        for found in _hindrances(args):
            raise TrainerError(RULE, REMEDY, method=method.kind, found=found)
    elif SaveStrategy(args.save_strategy) != SaveStrategy.NO and not args.save_only_model:
        raise TrainerError(
            "of a sharded model (FSDP) torch loads an optimizer only if each parameter has had a step when it was saved.",
            "Set `save_only_model=True` or `save_strategy='no'`, or use DDP.",
            method=f"{method.kind}, of which some parameters have no part in some steps",
            found=f"save_strategy={SaveStrategy(args.save_strategy).value!r}",
        )


def _obstacles(args: TrainingArguments, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    plugin = fsdp_plugin()
    if args.n_gpu > 1:
        yield (
            f"one process with {args.n_gpu} GPUs: `DataParallel` copies the model in every forward",
            "a prompt trains on several GPUs with one process each.",
            "Launch with `torchrun --nproc-per-node N` or `accelerate launch`, or show one GPU (`CUDA_VISIBLE_DEVICES=0`).",
        )
    if args.deepspeed or _uses_deepspeed():
        yield (
            "DeepSpeed, which keeps parameters and optimizer in partitions of its own",
            "a prompt trains in several processes with DDP or FSDP2.",
            "Launch without DeepSpeed; where the base does not fit on one device, use FSDP2 (`fsdp=True`).",
        )
    if plugin is not None and plugin.fsdp_version == 1:
        yield (
            "FSDP 1, which flattens frozen and trained parameters into one",
            "a prompt trains in a sharded model with FSDP2.",
            "Set `fsdp_config={'version': 2}`, or `fsdp_version: 2` in accelerate's configuration.",
        )
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        yield (
            "`cpu_ram_efficient_loading`: ranks other than 0 hold no weights yet",
            "a prompt is attached to a model that has its weights, on every rank.",
            "Set `cpu_ram_efficient_loading` to false.",
        )
    kind = getattr(plugin, "state_dict_type", None)
    if kind is not None and "FULL" not in str(kind):
        yield (
            f"`{getattr(kind, 'name', kind)}`: the Trainer writes every weight in shards, and does not ask for the prompt",
            "a prompt is saved, alone, where the Trainer saves full state dicts.",
            "Set `fsdp_config={'state_dict_type': 'FULL_STATE_DICT'}`, or `fsdp_state_dict_type` in accelerate's configuration.",
        )
    if prompted_model_of(model) is None and shards(model):
        yield (
            "a model whose weights are sharded already",
            "a prompt must be on the model before it is sharded, so that it is shared rightly.",
            "Let the Trainer shard the model, or call `softhooks.attach` first.",
        )


def _hindrances(args: TrainingArguments) -> Iterator[str]:
    """Why the Trainer's DDP will not look for parameters that have no part in a step."""
    asked = args.ddp_find_unused_parameters
    runs_again = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    if asked is None and runs_again:
        yield "gradient_checkpointing=True, for which the Trainer sets find_unused_parameters=False"
    if asked is False:
        yield "ddp_find_unused_parameters=False"
    if getattr(args, "ddp_static_graph", None):
        yield "ddp_static_graph=True"


def _uses_deepspeed() -> bool:
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils.dataclasses import DistributedType

    return is_initialized() and AcceleratorState().distributed_type == DistributedType.DEEPSPEED


def way_in(method: Method, asked: Injection | None) -> Injection | None:
    """Choose the way in where the base will be sharded: prompts then enter as slots, for weights come and go.

    Raises:
        TrainerError: another way was asked for.
    """
    if fsdp_plugin() is None or method.enters != "embeddings":
        return asked
    if asked not in (None, "slots"):
        raise TrainerError(
            "in a sharded model (FSDP) a prompt of embeddings enters as slots.",
            "Leave `injection` out, or give `injection='slots'`.",
            injection=repr(asked),
        )
    return "slots"


def redirect(prompt: SoftPrompt, asked: Injection | None) -> None:
    """Let a prompt that is attached enter in the way that this training needs."""
    if asked is not None and prompt.injection != asked:
        prompt.injection = choose_injection(prompt, asked)


# --- the same prompt on all ranks -------------------------------------------------------------------------------------


def is_alone() -> bool:
    """Whether there is no other process to agree with."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def agree(prompt: SoftPrompt, device: torch.device) -> None:
    """Let every rank hold what rank 0 holds: the prompt, and what differs of the base (a head made at random).

    DDP would send rank 0's tensors around after the record of the frozen ones was taken; FSDP2 would put a prompt together
    from parts of different ones.

    Args:
        device: where the processes exchange tensors.

    Raises:
        TrainerError: ranks hold different methods or models.
    """
    if is_alone() or shards(prompt.model):
        return
    prompted = prompt.prompted_model
    tensors = {**dict(prompt.model.named_parameters()), **dict(prompt.model.named_buffers()), **live_tensors(prompt)}
    shapes = {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
    _require_equal({"method": repr(prompt.method), **shapes}, "must attach one method to one model")
    known = {} if prompted.record is None else prompted.record.digests
    mine = {name: known[name].bits if name in known else digest(tensor).bits for name, tensor in tensors.items()}
    theirs = _from_first(mine)
    here = sorted(name for name in mine if mine[name] != theirs[name])
    anywhere = sorted({name for names in _from_each(here) for name in names})
    with torch.no_grad():
        for name in anywhere:
            shared = tensors[name].detach().to(device).contiguous()
            distributed.broadcast(shared, src=0)
            if name in here:
                tensors[name].copy_(shared)
    if any(name in known for name in here):
        prompted.record = FrozenRecord(prompt.model, frozen_names(prompt.model))
    if anywhere:
        logger.info("ranks differed in %d tensors, and hold those of rank 0 now: %s", len(anywhere), anywhere[:8])


def require_agreement(prompt: SoftPrompt) -> None:
    """Check that all ranks hold the same prompt; parts of a sharded one belong together by themselves.

    Raises:
        TrainerError: they do not.
    """
    if is_alone() or shards(prompt.model):
        return
    bits = {name: digest(tensor).bits for name, tensor in live_tensors(prompt).items()}
    _require_equal(bits, "must hold the same prompt")


def _require_equal(mine: dict[str, str], what: str) -> None:
    """Compare with rank 0; every rank raises if one differs, so that none waits for the others."""
    theirs = _from_first(mine)
    differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    example = {name: (mine.get(name), theirs.get(name)) for name in differing[:1]}
    reports: Sequence[tuple[list[str], dict[str, Any]]] = _from_each((differing[:8], example))
    for rank, (names, values) in enumerate(reports):
        if names:
            own, first = values[names[0]]
            raise TrainerError(
                f"all ranks {what}.",
                "Give every rank the same script, files and checkpoint; let no code change parameters on one rank only.",
                differing=", ".join(names),
                rank_0=f"{names[0]}: {first}",
                **{f"rank_{rank}": f"{names[0]}: {own}"},
            )


def _from_first(value: Any) -> Any:
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _from_each(value: Any) -> list[Any]:
    box: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(box, value)
    return box

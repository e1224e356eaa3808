"""Refuse distributed settings (DataParallel, DeepSpeed, FSDP, DDP) that would silently train a prompt incorrectly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from softhooks.compat.sharding import is_sharded_model
from softhooks.errors import TrainerError
from softhooks.method import Method
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.runtime.unused_parameters import unused_parameters_error


def fsdp_plugin() -> Any:
    """Return the FSDP plugin that Accelerate uses in this process, or None if FSDP is not used."""
    from accelerate.state import AcceleratorState, is_initialized

    return getattr(AcceleratorState(), "fsdp_plugin", None) if is_initialized() else None


def check_launch(args: TrainingArguments, model: nn.Module, method: Method) -> None:
    """Check the distributed settings before a prompt is attached."""
    for found, remedy in _obstacles(args, model):
        raise TrainerError(found, remedy)
    if args.world_size == 1 or not method.has_unused_parameters(method.batch_columns):
        return
    if fsdp_plugin() is None:
        for found in _ddp_obstacles(args):
            raise unused_parameters_error(method.kind, found)
    elif SaveStrategy(args.save_strategy) != SaveStrategy.NO and not args.save_only_model:
        raise TrainerError(
            f"save_strategy={SaveStrategy(args.save_strategy).value!r} would save an optimizer state that torch cannot load "
            "under FSDP, because parameters that were never used have no state.",
            "Set `save_only_model=True` or `save_strategy='no'`, or use DDP.",
            method=f"{method.kind}, with parameters that are unused in some steps",
        )


def _obstacles(args: TrainingArguments, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the reasons why these settings cannot train a prompt, each with a remedy."""
    plugin = fsdp_plugin()
    if args.n_gpu > 1:
        yield (
            f"one process uses {args.n_gpu} GPUs with `DataParallel`, which copies the model without its hooks.",
            "Start one process per GPU (`torchrun --nproc-per-node N`, `accelerate launch`), or set `CUDA_VISIBLE_DEVICES=0`.",
        )
    if args.deepspeed or _uses_deepspeed():
        yield (
            "DeepSpeed is not supported, because it partitions parameters and optimizer states.",
            "Launch without DeepSpeed; if the base does not fit on one device, use FSDP2 (`fsdp=True`).",
        )
    if plugin is not None and plugin.fsdp_version == 1:
        yield (
            "FSDP 1 is not supported, because it flattens frozen and trainable parameters into one tensor.",
            "Use FSDP2: `fsdp_config={'version': 2}`, or `fsdp_version: 2` in accelerate's configuration.",
        )
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        yield (
            "with `cpu_ram_efficient_loading` only rank 0 loads the weights, but every rank needs them to attach a prompt.",
            "Set `cpu_ram_efficient_loading` to false.",
        )
    kind = getattr(plugin, "state_dict_type", None)
    if kind is not None and "FULL" not in str(kind):
        yield (
            f"with `{getattr(kind, 'name', kind)}` the Trainer writes sharded checkpoints of the whole model, not of the prompt.",
            "Set `fsdp_config={'state_dict_type': 'FULL_STATE_DICT'}`, or `fsdp_state_dict_type` in accelerate's configuration.",
        )
    if prompted_model_of(model) is None and is_sharded_model(model):
        yield (
            "the model is already sharded; a prompt must be attached before sharding.",
            "Pass the model to the Trainer unsharded, or call `softhooks.attach` before you shard it.",
        )


def _ddp_obstacles(args: TrainingArguments) -> Iterator[str]:
    """Yield the arguments that keep DDP from looking for unused parameters."""
    asked = args.ddp_find_unused_parameters
    recomputes = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    if asked is None and recomputes:
        yield "gradient_checkpointing=True, which makes the Trainer set find_unused_parameters=False"
    if asked is False:
        yield "ddp_find_unused_parameters=False"
    if getattr(args, "ddp_static_graph", None):
        yield "ddp_static_graph=True"


def _uses_deepspeed() -> bool:
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils.dataclasses import DistributedType

    return is_initialized() and AcceleratorState().distributed_type == DistributedType.DEEPSPEED


def injection_for_launch(method: Method, asked: Injection | None) -> Injection | None:
    """Return the injection to request: under FSDP, "slots" for input embeddings; otherwise, the one that was asked for.

    Under FSDP, "shared" would need weights that FSDP gathers only layer by layer.
    """
    if fsdp_plugin() is None or method.enters != "embeddings":
        return asked
    if asked not in (None, "slots"):
        raise TrainerError(
            f"injection={asked!r} is not available under FSDP; methods that train input embeddings can use only 'slots'.",
            "Leave `injection` out, or pass `injection='slots'`.",
        )
    return "slots"

"""LLaMA-Factory: train a prompt with its training command.

`run_exp` takes the arguments of a LLaMA-Factory YAML file, with `finetuning_type: full`, and trains a prompt with them.
Checkpoints and the model saved at the end hold only the prompt.

These raise an error: `finetuning_type` other than `full` (an adapter would be frozen); stages other than `sft` and `pt` (not
tested with prompts); other trainers (`use_mca`, `use_hyper_parallel`, `USE_RAY`, `use_kt`, `use_unsloth`); optimizers for full
fine-tuning or LoRA (GaLore, APOLLO, BAdam, Muon, Adam-mini, LoRA+); `use_asft_loss`, `use_llama_pro`, `adapter_name_or_path`,
DeepSpeed.

LLaMA-Factory requires an older version of transformers than softhooks supports. This module is based on the source code of
llamafactory 0.9.5. LLaMA-Factory's training command was run by hand on a tiny model, and resumed training bit for bit; this
required `DISABLE_VERSION_CHECK=1`, an environment without torchaudio, and `disable_gradient_checkpointing: true`, because
LLaMA-Factory's gradient checkpointing fails under transformers 5.23. The tests run without LLaMA-Factory: they test which
arguments are refused, and pass the callback to a Trainer of transformers.

Example:
    import softhooks
    from softhooks.integrations.llamafactory import callback_for

    # `run_exp(arguments, method)` gives this callback to LLaMA-Factory's own `run_exp`
    arguments = {"stage": "sft", "finetuning_type": "full", "do_train": True, "output_dir": "out"}
    callback = callback_for(arguments, softhooks.PrefixTuning(16))
    trainer = Seq2SeqTrainer(model, Seq2SeqTrainingArguments("out"), train_dataset=dataset, callbacks=[callback])
    trainer.train()
    trainer.save_model("out/prompt")

Versions tested: llamafactory 0.9.5, with a newer transformers than it supports
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from softhooks.errors import TrainerError
from softhooks.integration_support.training import SoftPromptCallback
from softhooks.method import Method

from ._imports import import_framework

__all__ = ["callback_for", "run_exp"]

_STAGES = ("sft", "pt")
_UNSUPPORTED = {
    "use_mca": "Megatron's trainer does not accept callbacks of transformers",
    "use_hyper_parallel": "HyperParallel's trainer does not derive from the Trainer of transformers",
    "use_kt": "KTransformers replaces the modules to which the prompt is attached",
    "use_unsloth": "Unsloth replaces the forwards of the modules to which the prompt is attached",
    "use_asft_loss": "its reference model has not been tested with a prompt",
    "use_galore": "it projects gradients of the base, which is frozen",
    "use_apollo": "it projects gradients of the base, which is frozen",
    "use_badam": "it trains blocks of the base, which is frozen",
    "use_muon": "it updates weight matrices of the base, which is frozen",
    "use_adam_mini": "it groups parameters of the base, which is frozen",
    "loraplus_lr_ratio": "it sets learning rates of LoRA, which is not trained",
    "use_llama_pro": "it trains new blocks of the base",
    "deepspeed": "it keeps parameters and optimizer states in its own partitions",
    "adapter_name_or_path": "the adapter would be frozen",
}


def run_exp(args: Mapping[str, Any], method: Method, **options: Any) -> SoftPromptCallback:
    """Run LLaMA-Factory's training with a prompt.

    Args:
        args: LLaMA-Factory's arguments.
        method: the method and its options, such as `PromptTuning(20)`.
        options: other arguments of `SoftPromptCallback`.

    Returns:
        the callback, with the prompt as `soft_prompt`.

    Raises:
        TrainerError: an argument cannot be used with a prompt. Nothing is loaded.
        SoftHooksError: LLaMA-Factory is not installed.
    """
    callback = callback_for(args, method, **options)
    import_framework("llamafactory.train.tuner", "LLaMA-Factory").run_exp(dict(args), callbacks=[callback])
    if callback.soft_prompt is None:
        raise TrainerError(
            "the prompt was not trained, because LLaMA-Factory created no Trainer.", "Set `do_train: true`."
        )
    return callback


def callback_for(args: Mapping[str, Any], method: Method, **options: Any) -> SoftPromptCallback:
    """Check LLaMA-Factory's arguments, and create the callback for its `run_exp`.

    Raises:
        TrainerError: an argument cannot be used with a prompt.
    """
    stage, kind = args.get("stage", "sft"), args.get("finetuning_type", "lora")
    if stage not in _STAGES:
        raise _refusal(f"stage: {stage}", "this stage has not been tested with a prompt", "Use `sft` or `pt`.")
    if kind != "full":
        remedy = "Write `finetuning_type: full`; the callback freezes everything but the prompt."
        raise _refusal(f"finetuning_type: {kind}", "the weights that it trains would be frozen", remedy)
    for name, reason in _UNSUPPORTED.items():
        if args.get(name):
            raise _refusal(f"{name}: {args[name]}", reason, f"Remove `{name}`.")
    if os.environ.get("USE_RAY", "0").lower() in ("1", "true", "y", "yes"):
        raise _refusal("USE_RAY", "the callback would be copied to Ray's workers", "Use softhooks.integrations.ray.")
    return SoftPromptCallback(method, **options)


def _refusal(asked: str, reason: str, remedy: str) -> TrainerError:
    return TrainerError(f"`{asked}` cannot be used with a prompt in LLaMA-Factory: {reason}.", remedy)

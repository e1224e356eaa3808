"""LLaMA-Factory: its training command with a prompt.

`run_exp` checks the arguments and calls LLaMA-Factory's own `run_exp(args, callbacks=[SoftPromptCallback(...)])`, which hands
the callback to its Trainer. Checkpoints and the model that is saved at the end hold the prompt only. The arguments are
LLaMA-Factory's (a YAML file's content), with `finetuning_type: full`: the callback freezes the base, and proves that it has.

Refused by name: `finetuning_type` other than `full` (an adapter would be frozen without a word); stages other than `sft` and `pt`
(references and heads that nobody has tried); trainers that are not transformers' (`use_mca`, `use_hyper_parallel`), `USE_RAY`,
`use_kt`, `use_unsloth`; optimizers that look at the base (GaLore, APOLLO, BAdam, Muon, Adam-mini, LoRA+); `use_asft_loss`,
`use_llama_pro`, `adapter_name_or_path`, DeepSpeed.

LLaMA-Factory asks for an older transformers than softhooks supports. This was read from the source of llamafactory 0.9.5, and its
training command was run on a tiny model, and resumed bit for bit, with `DISABLE_VERSION_CHECK=1`, torchaudio left out, and
`disable_gradient_checkpointing: true`, for its own checkpointing fails under transformers 5.23. The test suite has no
LLaMA-Factory: it checks the signature and the arguments, and a stand-in hands the callback to a real Trainer.

Example:
    import softhooks
    from softhooks.integrations.llamafactory import callback_for

    # `run_exp(arguments, method)` gives this callback to LLaMA-Factory's own `run_exp`
    arguments = {"stage": "sft", "finetuning_type": "full", "do_train": True, "output_dir": "out"}
    callback = callback_for(arguments, softhooks.PrefixTuning(16))
    trainer = Seq2SeqTrainer(model, Seq2SeqTrainingArguments("out"), train_dataset=dataset, callbacks=[callback])
    trainer.train()
    trainer.save_model("out/prompt")

Versions tested: llamafactory 0.9.5, outside of its own range of versions
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from softhooks.errors import SoftHooksError, TrainerError
from softhooks.integration_support.training import SoftPromptCallback
from softhooks.method import Method

__all__ = ["callback_for", "run_exp"]

_STAGES = ("sft", "pt")
_OTHERS = {
    "use_mca": "Megatron's trainer takes no callbacks of transformers",
    "use_hyper_parallel": "HyperParallel's trainer is not transformers'",
    "use_kt": "KTransformers replaces the modules that the prompt enters",
    "use_unsloth": "Unsloth replaces the forwards that the prompt enters",
    "use_asft_loss": "its reference is a second model",
    "use_galore": "it projects the gradients of the base's matrices",
    "use_apollo": "it projects the gradients of the base's matrices",
    "use_badam": "it chooses what trains by itself, block by block",
    "use_muon": "it is for matrices of the base",
    "use_adam_mini": "it groups the base's parameters by its own rules",
    "loraplus_lr_ratio": "it is for adapters",
    "use_llama_pro": "it trains new blocks",
    "deepspeed": "it keeps parameters and optimizer in partitions of its own",
    "adapter_name_or_path": "an adapter would be frozen",
}


def run_exp(args: Mapping[str, Any], method: Method, **options: Any) -> SoftPromptCallback:
    """Run LLaMA-Factory's training with a prompt.

    Args:
        args: its arguments.
        method: what to train.
        options: further ones of `SoftPromptCallback`.

    Returns:
        the callback, with the prompt and the report of the proof.

    Raises:
        TrainerError: the arguments ask for what a prompt cannot be trained with; nothing was loaded.
        SoftHooksError: LLaMA-Factory is not installed.
    """
    callback = callback_for(args, method, **options)
    try:
        from llamafactory.train import tuner
    except ImportError as error:
        raise SoftHooksError(
            "this needs LLaMA-Factory; install it in an environment of its own, as it documents it, and softhooks beside it."
        ) from error
    tuner.run_exp(dict(args), callbacks=[callback])
    if callback.soft_prompt is None:
        raise TrainerError("LLaMA-Factory's Trainer must meet the callback; it did not. Set `do_train: true`.")
    return callback


def callback_for(args: Mapping[str, Any], method: Method, **options: Any) -> SoftPromptCallback:
    """Check LLaMA-Factory's arguments, and make the callback that its `run_exp` takes.

    Raises:
        TrainerError: they ask for what a prompt cannot be trained with.
    """
    stage, kind = args.get("stage", "sft"), args.get("finetuning_type", "lora")
    if stage not in _STAGES:
        raise _refusal(
            f"stage: {stage}", "its references and heads have not been tried with a prompt", "Use `sft` or `pt`."
        )
    if kind != "full":
        remedy = "Write `finetuning_type: full`: only the prompt trains, the callback freezes everything else."
        raise _refusal(f"finetuning_type: {kind}", "what it would train is frozen while a prompt trains", remedy)
    for name, why in _OTHERS.items():
        if args.get(name):
            raise _refusal(f"{name}: {args[name]}", why, f"Leave `{name}` out.")
    if os.environ.get("USE_RAY", "0").lower() in ("1", "true", "y", "yes"):
        raise _refusal("USE_RAY", "the callback would be copied to Ray's workers", "Use softhooks.integrations.ray.")
    return SoftPromptCallback(method, **options)


def _refusal(asked: str, why: str, remedy: str) -> TrainerError:
    rule = "a prompt trains in LLaMA-Factory's supervised fine-tuning and pre-training, and nothing else trains."
    return TrainerError(rule, remedy, asked=asked, because=why)

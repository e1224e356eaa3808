"""TRL: prompts in SFT, DPO, KTO, Reward, GRPO and RLOO trainers, with `callbacks=[SoftPromptCallback(method)]`.

DPO and KTO compare the policy with a reference model. `reference(model)` is the same model without its prompt, and needs no extra
memory. If you pass no `ref_model`, TRL loads a second copy of the model; with `precompute_ref_log_probs=True`, it runs the policy
instead, with the prompt disabled. GRPO and RLOO generate with the prompt.

In packed rows (`bfd`, `bfd_split`) and padding-free rows, every document gets the prompt, with sdpa or eager attention. `wrapped`
rows may split documents; each row gets the prompt once.

These raise an error before the first step: `use_vllm`, continuous batching, `sync_ref_model`, `use_liger_kernel`,
`cast_lm_head_to_fp32` on heads that are not in fp32, methods with their own objective, PEFT adapters that the prompt would
freeze, PEFT adapters in GRPO and RLOO unless `beta=0.0`, references with a trainable prompt (`copy.deepcopy` of the policy),
`reference` under FSDP, and TRL's other trainers.

Versions tested: trl 1.16.0

Example:
    from trl import DPOTrainer

    from softhooks import PrefixTuning, SoftPromptCallback
    from softhooks.integrations.trl import reference

    callback = SoftPromptCallback(PrefixTuning(num_virtual_tokens=16))  # start with learning_rate=5e-3
    trainer = DPOTrainer(
        model, ref_model=reference(model), args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    trainer.save_model("preferences/prompt")
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.errors import TrainerError
from softhooks.integration_support import Patches, SharedPatches
from softhooks.integration_support.models import PromptedModel, prompted_model_of
from softhooks.integration_support.training import Reference, eval_mode, require_fixed
from softhooks.method import Method
from softhooks.switch import disabled

__all__ = ["reference"]

_TRAINERS = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO")
_UNSUPPORTED = {
    "use_vllm": "would generate completions without the prompt: TRL sends vLLM only the model's weights",
    "use_transformers_continuous_batching": "would convert the frozen base to 16 bits, for paged attention",
    "sync_ref_model": "would copy the policy's parameters to the reference, which has no parameters for the prompt",
    "use_liger_kernel": "would replace the model's layers after the prompt was attached and checked on them",
}
_COMPARING = {"DPOConfig": "DPOTrainer", "KTOConfig": "KTOTrainer"}


def reference(model: nn.Module, prompt: str | None = None) -> Reference:
    """Return the policy without its trained prompt, as the `ref_model` of a DPO or KTO trainer.

    Args:
        model: the trainer's model.
        prompt: the name of another prompt of the model for the reference to use, such as a frozen one from an earlier run; None
            for no prompt.
    """
    return Reference(model, prompt)


# --- settings ---------------------------------------------------------------------------------------------------------


def check(args: Any, model: nn.Module, method: Method, trainable: Sequence[str]) -> None:
    """Refuse settings that do not work with a prompt; `SoftPromptCallback` calls this before it attaches the prompt."""
    for found, remedy in (*_unsupported(args, model, method), *_adapter_conflicts(args, model, trainable)):
        raise TrainerError(found, remedy)


def _kind(args: Any) -> str:
    """Return the name of the TRL config class of `args`, such as "DPOConfig", even if the user subclassed it."""
    return next(kind.__name__ for kind in type(args).__mro__ if kind.__module__.partition(".")[0] == "trl")


def _unsupported(args: Any, model: nn.Module, method: Method) -> Iterator[tuple[str, str]]:
    """Yield the settings that do not work with a prompt, each with a remedy."""
    kind = _kind(args)
    if kind.removesuffix("Config") not in _TRAINERS:
        yield (
            f"the trainer of {kind} has not been tested with a prompt; the supported trainers are {', '.join(_TRAINERS)}.",
            "Use one of these, or your own training loop with `softhooks.attach`.",
        )
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name, False):
            yield f"{name}=True {reason}.", f"Set `{name}=False`."
    head = model.get_output_embeddings() if getattr(args, "cast_lm_head_to_fp32", False) else None  # type: ignore[operator]
    if head is not None and head.weight.dtype != torch.float32:
        yield (
            f"cast_lm_head_to_fp32=True would convert the frozen head from {head.weight.dtype} after the prompt was attached.",
            "Convert the head before you create the trainer: `model.lm_head.float()`.",
        )
    if method.objective() is not None:
        yield (
            f"{method!r} has its own objective, which changes the model's loss; TRL computes the loss itself.",
            "Use the Trainer of transformers, or a method without its own objective.",
        )


def _adapter_conflicts(args: Any, model: nn.Module, trainable: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the conflicts between PEFT adapters and the prompt, each with a remedy."""
    if not hasattr(model, "peft_config"):
        return
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = [name for name in trained if not any(fnmatch.fnmatch(name, pattern) for pattern in trainable)]
    if frozen and prompted_model_of(model) is None:
        yield (
            f"the prompt would freeze the adapter of `peft_config` ({frozen[0]} and {len(frozen) - 1} other tensors).",
            "Leave `peft_config` out, or train both: `SoftPromptCallback(method, trainable='*lora_*')`.",
        )
    if _kind(args) in ("GRPOConfig", "RLOOConfig") and args.beta != 0.0:
        yield (
            f"with beta={args.beta} and a PEFT adapter, TRL's reference is the policy without the adapter but with the prompt.",
            "Set `beta=0.0`, or merge the adapter into the model.",
        )


# --- trainers with a reference model ----------------------------------------------------------------------------------


def guard(args: Any, prompted: PromptedModel) -> None:
    """Keep the prompt out of the reference in DPO and KTO; `SoftPromptCallback` calls this after it has attached the prompt."""
    name = _COMPARING.get(_kind(args))
    if name is not None:
        import trl

        prompted.outside_patches.keep(_ReferenceGuard(getattr(trl, name)))


class _ReferenceGuard:
    """Wraps two methods of a trainer's class until all guards are removed.

    It wraps the class because callbacks cannot access the trainer itself.
    """

    def __init__(self, trainer: type) -> None:
        _guards.add(self, trainer)

    def remove(self) -> None:
        _guards.discard(self)


def _wrap_trainer(patches: Patches, trainer: type) -> None:
    patches.wrap(trainer, "compute_loss", _with_checked_reference)
    patches.wrap(trainer, "compute_ref_log_probs", _without_prompt)


_guards: SharedPatches[_ReferenceGuard] = SharedPatches(_wrap_trainer)


def _with_checked_reference(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompted = prompted_model_of(self.model)
        if prompted is not None and prompted.is_on:
            _refuse_trainable_reference(self)
            if self.ref_model is None and not self.precompute_ref_logps:
                raise TrainerError(
                    "without a `ref_model`, TRL's reference is the policy without its PEFT adapter but with the prompt.",
                    "Set `precompute_ref_log_probs=True`, which disables adapter and prompt, or pass a `ref_model`.",
                )
        return original(self, *args, **kwargs)

    return compute_loss


def _without_prompt(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(original)
    def compute_ref_log_probs(self: Any, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        prompted = prompted_model_of(self.model)
        if prompted is None:
            return original(self, model, inputs)
        _refuse_trainable_reference(self)
        if self.ref_model is not None:
            return original(self, model, inputs)
        if self.state.global_step:
            require_fixed(self.model, None)
        # No other thread may run the model meanwhile, because the mode of its modules changes.
        alone = prompted.running.exclusive("the forward of a reference model", lambda: bool(self.model.training))
        with alone, disabled(self.model), eval_mode(self.model):
            return original(self, model, inputs)

    return compute_ref_log_probs


def _refuse_trainable_reference(trainer: Any) -> None:
    """Refuse a reference with a trainable prompt, such as a deep copy of the policy."""
    prompted = None if trainer.ref_model is None else prompted_model_of(trainer.ref_model)
    if prompted is None or not prompted.is_on:
        return
    encoders = [prompt.encoder for prompt in prompted.prompts.values()]
    if any(parameter.requires_grad for encoder in encoders for parameter in encoder.parameters()):
        raise TrainerError(
            f"the `ref_model` has a trainable copy of the prompt {prompted.selection_text}; its prompt must be frozen.",
            "Pass `ref_model=softhooks.integrations.trl.reference(model)`. To compare with an earlier prompt, load it onto the "
            "model under another name, and pass `reference(model, prompt=name)`.",
        )

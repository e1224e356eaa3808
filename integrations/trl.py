"""Train a prompt with TRL: `callbacks=[SoftPromptCallback(method)]` in SFT, DPO, KTO, Reward, GRPO and RLOO trainers.

DPO and KTO compare the policy with a reference. `reference(model)` is the same model with its prompt off, and takes no memory;
without it TRL loads a second copy from `model.config.name_or_path`, which is as right. With `precompute_ref_log_probs=True` and
no reference TRL runs the policy itself: the callback turns the prompt off for that. GRPO generates with the prompt.

Packed (`bfd`, `bfd_split`) and padding-free rows give every document the prompt, with sdpa or eager attention; `wrapped` rows are
cut through documents and get one prompt each.

Refused by name, before a step: `use_vllm` and continuous batching (they generate without the prompt, or convert the base),
`sync_ref_model`, `use_liger_kernel`, `cast_lm_head_to_fp32` on other heads, methods with an objective of their own, adapters of
PEFT that a prompt would freeze or that share a reference with it, references with a prompt to be trained (`copy.deepcopy` of a
model that has one), `reference` under FSDP, and TRL's other trainers.

Versions tested: trl 1.16.0

Example:
    from trl import DPOTrainer

    from softhooks import PrefixTuning, SoftPromptCallback
    from softhooks.integrations.trl import reference

    trainer = DPOTrainer(
        model,
        ref_model=reference(model),
        args=args,  # a DPOConfig; learning_rate=5e-3 is where to start
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[SoftPromptCallback(PrefixTuning(num_virtual_tokens=16))],
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
from softhooks.integration_support.models import PromptedModel, prompted_model_of
from softhooks.integration_support.training import Patches, Reference, SharedPatches, eval_mode, require_fixed
from softhooks.method import Method
from softhooks.switch import disabled

__all__ = ["reference"]

_TRAINERS = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO")
_COMPARING = {"DPOConfig": "DPOTrainer", "KTOConfig": "KTOTrainer"}


def reference(model: nn.Module, prompt: str | None = None) -> Reference:
    """The policy's own model, without the prompt that trains on it, as the `ref_model` of a DPO or KTO trainer.

    Args:
        model: the model that the trainer is given.
        prompt: run with this other prompt of the model instead, which must rest: the one that was trained before, say, loaded
            under a name of its own. None: the bare model.
    """
    return Reference(model, prompt)


# --- settings ---------------------------------------------------------------------------------------------------------


def check(args: Any, model: nn.Module, method: Method, trainable: Sequence[str]) -> None:
    """Refuse what TRL would do wrongly with a prompt. `SoftPromptCallback` calls this before it attaches.

    Raises:
        TrainerError: naming the setting.
    """
    for found, rule, remedy in (*_unserved(args, model, method), *_adapters(args, model, trainable)):
        raise TrainerError(rule, remedy, found=found)


def _kind(args: Any) -> str:
    """The name of TRL's own class of arguments, also where a user has derived another from it."""
    return next(kind.__name__ for kind in type(args).__mro__ if kind.__module__.partition(".")[0] == "trl")


def _unserved(args: Any, model: nn.Module, method: Method) -> Iterator[tuple[str, str, str]]:
    kind = _kind(args)
    if kind.removesuffix("Config") not in _TRAINERS:
        yield (
            kind,
            f"of TRL's trainers, a prompt trains in those for {', '.join(_TRAINERS)}: what others do to a model is not known.",
            "Use one of these, or a loop of your own with `softhooks.attach`.",
        )
    if getattr(args, "use_vllm", False):
        yield (
            "use_vllm=True: vLLM is sent the weights, and generates without the prompt",
            "completions must come from the policy that is trained, prompt and all.",
            "Set `use_vllm=False`: the model itself then generates, with the prompt.",
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        yield (
            "use_transformers_continuous_batching=True: paged attention, for which TRL also converts the base to 16 bits",
            "completions must come from the policy that is trained, and its base must stay as it is.",
            "Set it to False: the model then generates batch by batch, with the prompt.",
        )
    if getattr(args, "sync_ref_model", False):
        yield (
            "sync_ref_model=True: TRL mixes the parameters of the policy into those of the reference, one by one",
            "a reference without a prompt has no parameters to follow a prompt with.",
            "Set `sync_ref_model=False`.",
        )
    if getattr(args, "use_liger_kernel", False):
        yield (
            "use_liger_kernel=True: the model's layers are replaced when training begins",
            "a prompt is proven on the layers that the model has when it is attached.",
            "Set `use_liger_kernel=False`; TRL's own fused head spares the logits already.",
        )
    head = model.get_output_embeddings() if getattr(args, "cast_lm_head_to_fp32", False) else None  # type: ignore[operator]
    if head is not None and head.weight.dtype != torch.float32:
        yield (
            f"cast_lm_head_to_fp32=True, and a head in {head.weight.dtype}: TRL converts it after the prompt is attached",
            "the base must stay as it is.",
            "Convert the head before the trainer is made: `model.lm_head.float()`.",
        )
    if method.objective() is not None:
        yield (
            repr(method),
            "a method with an objective of its own trains on the model's loss; TRL computes another, from no logits.",
            "Use the Trainer of transformers, or a method or option without an objective.",
        )


def _adapters(args: Any, model: nn.Module, trainable: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    if not hasattr(model, "peft_config"):
        return
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = [name for name in trained if not any(fnmatch.fnmatch(name, pattern) for pattern in trainable)]
    if frozen and prompted_model_of(model) is None:
        yield (
            f"{len(frozen)} tensors of an adapter, {frozen[0]} first",
            "`peft_config` asks TRL to train an adapter, and a prompt would freeze it.",
            "Leave `peft_config` out, or train both: `SoftPromptCallback(method, trainable='*lora_*')`.",
        )
    if _kind(args) in ("GRPOConfig", "RLOOConfig") and args.beta != 0.0:
        yield (
            f"beta={args.beta} with an adapter of PEFT: its reference is the policy with the adapter off and the prompt on",
            "a reference must be without the prompt that trains.",
            "Set `beta=0.0`, or merge the adapter into the model.",
        )


# --- trainers that compare --------------------------------------------------------------------------------------------


def guard(args: Any, prompted: PromptedModel) -> None:
    """Mind the reference of a DPO or KTO trainer until the model's last prompt is removed. `SoftPromptCallback` calls this."""
    name = _COMPARING.get(_kind(args))
    if name is not None:
        import trl

        prompted.outside_patches.keep(_Guard(getattr(trl, name)))


class _Guard:
    """Keeps two methods of a trainer's class wrapped, for no callback meets the trainer itself; the last one puts them back."""

    def __init__(self, trainer: type) -> None:
        _guards.add(self, trainer)

    def remove(self) -> None:
        _guards.discard(self)


def _wrap_trainer(patches: Patches, trainer: type) -> None:
    patches.wrap(trainer, "compute_loss", _comparing)
    patches.wrap(trainer, "compute_ref_log_probs", _computing)


_guards: SharedPatches[_Guard] = SharedPatches(_wrap_trainer)


def _comparing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompted = prompted_model_of(self.model)
        if prompted is not None and prompted.is_on:
            _require_bare(self)
            if self.ref_model is None and not self.precompute_ref_logps:
                raise TrainerError(
                    "a reference must be without the prompt that trains.",
                    "Set `precompute_ref_log_probs=True`, for which adapter and prompt are off, or pass a `ref_model`.",
                    found="an adapter of PEFT and no `ref_model`: TRL turns off the adapter, and the prompt stays on",
                )
        return original(self, *args, **kwargs)

    return compute_loss


def _computing(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(original)
    def compute_ref_log_probs(self: Any, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        if prompted_model_of(self.model) is None:
            return original(self, model, inputs)
        _require_bare(self)
        if self.ref_model is not None:
            return original(self, model, inputs)
        if self.state.global_step:
            require_fixed(self.model, None)
        with disabled(self.model), eval_mode(self.model):
            return original(self, model, inputs)

    return compute_ref_log_probs


def _require_bare(trainer: Any) -> None:
    """Refuse a reference with a prompt that could train, as a deep copy of a policy has; a prompt that was loaded may stay."""
    prompted = None if trainer.ref_model is None else prompted_model_of(trainer.ref_model)
    if prompted is None or not prompted.is_on:
        return
    encoders = [prompt.encoder for prompt in prompted.prompts.values()]
    if any(parameter.requires_grad for encoder in encoders for parameter in encoder.parameters()):
        raise TrainerError(
            "a reference must be without the prompt that trains.",
            "Pass `ref_model=softhooks.integrations.trl.reference(model)`. To compare with a prompt that was trained before, "
            "load it on the model under another name, and name it: `reference(model, prompt=name)`.",
            reference=f"{type(trainer.ref_model).__name__} with a copy of the prompt {prompted.selection_text}",
        )

"""accelerate: `Accelerator` checkpoints that hold the prompt instead of the model.

After `track`, `save_state` writes the prompt (for `softhooks.load`) and its live parameters instead of the model, as safetensors.
After `load_state`, the run resumes bit for bit. If a prepared module contains other tensors besides the prompted model, such as
a head, these tensors are saved too. `accelerator.save_model` and the model's `save_pretrained` write only the prompt.

Call `track` between `attach` and `prepare`; in a single process, you can also call it later. With several processes, all ranks
start with the prompt of rank 0, and `save_state` and `load_state` check that all ranks have the same prompt.

These raise an error: DeepSpeed, FSDP and Megatron, because their checkpoints always contain the base (under FSDP2, train with
the Trainer and SoftPromptCallback); `track` after `prepare` in several processes, because DDP would not synchronize the prompt;
optimizers without the prompt's parameters; two prompts on one model; a checkpoint of another method, base or optimizer, before
anything is loaded; `save_model` with `safe_serialization=False`, or for a module with tensors outside the prompted model. Under
DDP, methods with parameters that are unused in some steps (`MultitaskPromptTuning(teachers="train")`,
`LlamaAdapter(context_size=...)` without a context) need `DistributedDataParallelKwargs(find_unused_parameters=True)`.

Example:
    from accelerate import Accelerator
    from softhooks.integrations.accelerate import track

    accelerator = Accelerator()
    prompt = track(accelerator, softhooks.attach(model, softhooks.PrefixTuning(16, projection=True)))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state("checkpoint")  # to resume: `accelerator.load_state("checkpoint")`
    prompt.verify_frozen()

Versions tested: accelerate 1.15.0
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from softhooks.errors import TrainerError
from softhooks.integration_support.checkpoints import (
    LIVE,
    CheckpointSaver,
    read_tensors,
    saver_of,
    write_live,
    write_tensors,
)
from softhooks.integration_support.training import (
    broadcast_from_rank_0,
    is_sharded_model,
    is_single_process,
    require_held,
    require_same_on_all_ranks,
    require_trainable_prompt,
)
from softhooks.prompt import SoftPrompt

from ._outer_module import holds, outer_tensors, require_same, unwrap

if TYPE_CHECKING:
    from accelerate.accelerator import Accelerator

__all__ = ["track"]

AROUND = "soft_prompt.around.safetensors"
"""The file with the tensors of a prepared module that do not belong to the prompted model."""

_UNSUPPORTED = {
    "DEEPSPEED": "DeepSpeed keeps parameters and optimizer states in its own partitions",
    "FSDP": "FSDP writes the shards of the whole model without calling the hooks",
    "MEGATRON_LM": "Megatron keeps parameters and optimizer states in its own partitions",
}


def track(accelerator: Accelerator, prompt: SoftPrompt, *, check_frozen: bool = True) -> SoftPrompt:
    """Make an Accelerator's checkpoints hold a prompt instead of the model until the prompt is removed; return the prompt.

    Args:
        accelerator: the Accelerator.
        prompt: the prompt to train. The prompt that was tracked first is saved in the checkpoint's directory, and prompts of
            other models in its subdirectories `soft_prompt_1`, `soft_prompt_2`, ..., in the order in which they were tracked.
        check_frozen: whether to check before each checkpoint that the base has not changed.

    Raises:
        TrainerError: the prompt cannot be trained with this Accelerator; nothing is changed.
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise TrainerError(f"`track` was given {type(accelerator).__name__} instead of an accelerate.Accelerator.")
    prompt._require_attached()
    _refuse(accelerator, prompt)
    hooks = accelerator._save_model_state_pre_hook.values()
    trackers = [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), Tracker)]
    others = {tracker.number: tracker.prompt for tracker in trackers if tracker.prompt is not None}
    for other in others.values():
        if other.model is prompt.model:
            raise TrainerError(
                f"the Accelerator already tracks the prompt {other.name!r}; it can track one prompt per model.",
                "Remove the other prompt, or attach this one to another model.",
                asked=repr(prompt.name),
            )
    broadcast_from_rank_0(prompt, accelerator.device)
    Tracker(accelerator, prompt, max(others, default=-1) + 1, check_frozen)
    return prompt


def _refuse(accelerator: Any, prompt: SoftPrompt) -> None:
    require_trainable_prompt(prompt)
    kind = accelerator.distributed_type.value
    if kind in _UNSUPPORTED or is_sharded_model(prompt.model):
        raise TrainerError(
            f"`track` needs the whole model in each process, but {_UNSUPPORTED.get(kind, 'the model is sharded')}.",
            "Train with DDP, or under FSDP2 with `transformers.Trainer` and SoftPromptCallback.",
        )
    if not is_single_process() and any(holds(model, prompt.model) for model in accelerator._models):
        raise TrainerError(
            f"the model of {prompt.name!r} was prepared before `track`; DDP would not synchronize the prompt's gradients.",
            "Call `softhooks.attach`, then `track`, then `accelerator.prepare`.",
            processes=accelerator.num_processes,
        )
    _optimizer_of(accelerator, prompt)


class Tracker:
    """Writes the prompt with index `number` into the checkpoints of an Accelerator, and reads it from them."""

    def __init__(self, accelerator: Any, prompt: SoftPrompt, number: int, check_frozen: bool) -> None:
        self.number = number
        self.check_frozen = check_frozen
        self._accelerator = accelerator
        self._prompt = weakref.ref(prompt)  # because an Accelerator may outlive its models (`free_memory`)
        self._save_model_before = accelerator.save_model
        self._saver(prompt)
        patches = prompt.prompted_model.outside_patches
        patches.keep(accelerator.register_save_state_pre_hook(self._save))
        patches.keep(accelerator.register_load_state_pre_hook(self._load))
        patches.set(accelerator, "save_model", self.save_model)

    @property
    def prompt(self) -> SoftPrompt | None:
        """The prompt, or None if it was removed from its model."""
        prompt = self._prompt()
        return prompt if prompt is not None and prompt.is_attached else None

    def _saver(self, prompt: SoftPrompt) -> CheckpointSaver:
        saver = saver_of(prompt.model)
        if saver is None or saver.prompt is not prompt or saver.owner is not self:
            saver = CheckpointSaver(prompt, self)
            saver.writes_checkpoints = False
        return saver

    def _folder(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"soft_prompt_{self.number}" if self.number else Path(checkpoint)

    # --- save ---------------------------------------------------------------------------------------------------------

    def _save(self, models: list[nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
        """Write the prompt, and keep accelerate from writing the model."""
        prompt, accelerator = self.prompt, self._accelerator
        if prompt is None:
            return
        outer = outer_tensors(_require_prepared(models, prompt), prompt.model)
        saver = self._saver(prompt)
        saver.optimizer = _optimizer_of(accelerator, prompt)
        require_same_on_all_ranks(prompt)
        if self.check_frozen:
            prompt.verify_frozen()
        del weights[_index_of(prompt, weights)]
        if _writes(accelerator):
            folder = self._folder(output_dir)
            prompt.save_pretrained(folder)
            write_live(folder, saver.state())
            if outer:
                write_tensors(folder / AROUND, {name: t.clone() for name, t in outer.items()}, {"format": "pt"})

    def save_model(self, model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write only the prompt if the model contains the prompted model; otherwise call the original `save_model`."""
        prompt = self.prompt
        if prompt is None or not holds(model, prompt.model):
            self._save_model_before(model, save_directory, *args, **kwargs)
            return
        safe_serialization = args[1] if len(args) > 1 else kwargs.get("safe_serialization", True)
        outer = outer_tensors(unwrap(model), prompt.model)
        if outer or not safe_serialization:
            raise TrainerError(
                "`save_model` can write only the prompt of a prompted model, and only in safetensors.",
                "Call `prompt.save_pretrained(directory)`, and save the tensors outside the prompted model yourself.",
                safe_serialization=safe_serialization,
                outside_the_prompted_model=", ".join(list(outer)[:8]) or "none",
            )
        if _writes(self._accelerator):
            prompt.save_pretrained(save_directory)

    # --- load ---------------------------------------------------------------------------------------------------------

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        """Check a checkpoint, load the prompt from it, and keep accelerate from loading the model."""
        prompt = self.prompt
        if prompt is None:
            return
        model, folder, saver = _require_prepared(models, prompt), self._folder(input_dir), self._saver(prompt)
        saver.optimizer = _optimizer_of(self._accelerator, prompt)
        state = read_tensors(folder / LIVE)[0] if (folder / LIVE).is_file() else {}
        saver.check(state)
        if not saver.loaded:
            raise TrainerError(
                f"{folder} has no {LIVE} with the prompt {prompt.name!r}, so the run cannot be resumed from it.",
                "Load a checkpoint that `save_state` wrote while the prompt was tracked.",
            )
        outer = read_tensors(folder / AROUND)[0] if (folder / AROUND).is_file() else {}
        require_same(outer, outer_tensors(model, prompt.model))
        prompt.model.load_state_dict(state, strict=False)
        model.load_state_dict(outer, strict=False)
        models[:] = [other for other in models if not holds(other, prompt.model)]
        require_same_on_all_ranks(prompt)


# --- an Accelerator's models and optimizers ---------------------------------------------------------------------------


def _writes(accelerator: Any) -> bool:
    each_node = accelerator.project_configuration.save_on_each_node
    return bool(accelerator.is_local_main_process if each_node else accelerator.is_main_process)


def _require_prepared(models: list[nn.Module], prompt: SoftPrompt) -> nn.Module:
    """Return the prepared model that contains the prompted model, unwrapped."""
    for model in models:
        if holds(model, prompt.model):
            return unwrap(model)
    raise TrainerError(
        f"the Accelerator has not prepared the {type(prompt.model).__name__} of the tracked prompt {prompt.name!r}.",
        "Pass the model to `accelerator.prepare`, or remove the prompt.",
        prepared=", ".join(type(unwrap(model)).__name__ for model in models) or "none",
    )


def _index_of(prompt: SoftPrompt, weights: list[dict[str, Tensor]]) -> int:
    """Return the index of the prompted model's state dict in `weights`."""
    own = {parameter.data_ptr() for parameter in prompt.parameters()}
    pointers = [{value.data_ptr() for value in state.values() if isinstance(value, Tensor)} for state in weights]
    found = [number for number, held in enumerate(pointers) if own & held]
    if len(found) == 1:
        return found[0]
    raise TrainerError(
        f"{len(found)} of the {len(weights)} models that accelerate is about to write hold the prompt {prompt.name!r}; exactly "
        "one must hold it.",
        "Make sure that no other hook registered with `register_save_state_pre_hook` removes the weights first.",
    )


def _optimizer_of(accelerator: Any, prompt: SoftPrompt) -> str | None:
    """Return the name of the optimizer that trains a prompt, or None if no optimizer is prepared."""
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in accelerator._optimizers]
    remedy = "Create it from `prompt.parameters()`, after `attach`, and pass it to `accelerator.prepare`."
    return require_held(optimizers, prompt, remedy) if optimizers else None

"""Loops with an `accelerate.Accelerator`: its checkpoints hold the prompt in the place of the model.

`softhooks.attach` works in such a loop as in any other. `track` adds what the Accelerator cannot know: `save_state` writes the
prompt (`softhooks.load` reads it from the checkpoint) and its live parameters, in safetensors, and not the base; `load_state`
restores them, so that the run goes on bit for bit; optimizer, schedule and random numbers stay accelerate's. A checkpoint of
another method, base or optimizer is refused before anything is loaded. In several processes all ranks begin with one prompt, and
each checkpoint checks that they still hold one. What a prepared module holds around the prompted model is saved too.

Call it between `attach` and `prepare`; in one process it may also come later. `accelerator.unwrap_model` gives the model with its
prompt; `accelerator.save_model`, and `save_pretrained` of the model, write the prompt only.

Refused: DeepSpeed, FSDP and Megatron, whose checkpoints no hook can make smaller (a Trainer with SoftPromptCallback trains under
FSDP2); a prompt that comes after `prepare` in several processes, for DDP would not share it; optimizers that do not hold the
prompt; two prompts on one model; `save_model` of a module that holds more than the prompted model, or not in safetensors; in the
first forward under DDP, a prompt of which parts have no part in some steps (MPT that trains its teachers; LlamaAdapter with a
`context_size` and no context), unless `DistributedDataParallelKwargs(find_unused_parameters=True)` was among `kwargs_handlers`.

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
    accelerator.save_state("checkpoint")  # `accelerator.load_state("checkpoint")` goes on from it
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
    is_single_process,
    require_held,
    require_same_on_all_ranks,
    require_trainable_prompt,
    shards,
)
from softhooks.prompt import SoftPrompt

from ._carrier import around, bare, holds, require_same

if TYPE_CHECKING:
    from accelerate.accelerator import Accelerator

__all__ = ["track"]

AROUND = "soft_prompt.around.safetensors"
"""What a prepared model holds beside the prompted one."""

_PARTS = {
    "DEEPSPEED": "DeepSpeed keeps parameters and optimizer in partitions of its own",
    "FSDP": "FSDP writes the shards of the whole model, and no hook sees them",
    "MEGATRON_LM": "Megatron keeps parameters and optimizer in partitions of its own",
}
_tracked: weakref.WeakKeyDictionary[Any, list[Tracker]] = weakref.WeakKeyDictionary()


def track(accelerator: Accelerator, prompt: SoftPrompt, *, check_frozen: bool = True) -> SoftPrompt:
    """Let an Accelerator's checkpoints hold a prompt in the place of its model, until the prompt is removed.

    Args:
        accelerator: the loop's.
        prompt: what the loop trains. Several prompts, each on a model of its own, are saved in the order in which they were
            tracked: the first in the checkpoint's directory itself, the others in its `soft_prompt_1`, `soft_prompt_2`, ...
        check_frozen: before each checkpoint, compare the digests of the base.

    Returns:
        the prompt.

    Raises:
        TrainerError: the Accelerator, or its launch, cannot train the prompt rightly; nothing is changed.
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise TrainerError(f"track takes an accelerate.Accelerator; it was given {type(accelerator).__name__}.")
    prompt._require_attached()
    _refuse(accelerator, prompt)
    others = [tracker for tracker in _tracked.get(accelerator, []) if tracker.prompt is not None]
    for other in others:
        if other.prompt is not None and other.prompt.model is prompt.model:
            raise TrainerError(
                "an Accelerator tracks one prompt of a model.",
                "Remove the other prompt, or attach this one to a model of its own.",
                tracked=repr(other.prompt.name),
                asked=repr(prompt.name),
            )
    broadcast_from_rank_0(prompt, accelerator.device)
    number = max((other.number + 1 for other in others), default=0)
    _tracked[accelerator] = [*others, Tracker(accelerator, prompt, number, check_frozen)]
    return prompt


def _refuse(accelerator: Any, prompt: SoftPrompt) -> None:
    require_trainable_prompt(prompt)
    kind = accelerator.distributed_type.value
    if kind in _PARTS or shards(prompt.model):
        raise TrainerError(
            "an Accelerator's checkpoints hold a prompt only where each process holds the whole model.",
            "Train with DDP, or with `transformers.Trainer` and SoftPromptCallback, which knows FSDP2.",
            launched=_PARTS.get(kind, "the model is sharded"),
        )
    if not is_single_process() and any(holds(model, prompt.model) for model in accelerator._models):
        raise TrainerError(
            "in several processes a prompt must be on its model, and tracked, before the model is prepared.",
            "Call `softhooks.attach`, then `track`, then `accelerator.prepare`: DDP shares the gradients that it knows then.",
            processes=accelerator.num_processes,
            prompt=f"{prompt.name!r} on a model that is prepared already",
        )
    _optimizer_of(accelerator, prompt)


class Tracker:
    """What keeps one prompt in the checkpoints of one Accelerator.

    Attributes:
        number: its place among the prompts that the Accelerator tracks.
        check_frozen: whether each checkpoint compares the digests of the base.
    """

    def __init__(self, accelerator: Any, prompt: SoftPrompt, number: int, check_frozen: bool) -> None:
        self.number = number
        self.check_frozen = check_frozen
        self._accelerator = weakref.ref(accelerator)
        self._prompt = weakref.ref(prompt)  # an Accelerator outlives the models of `free_memory`
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        self._saver(prompt)
        self._model_before = accelerator.__dict__.get("save_model")
        self._save_model_before = accelerator.save_model
        accelerator.save_model = self.save_model
        prompt.prompted_model.outside_patches.keep(self)

    @property
    def prompt(self) -> SoftPrompt | None:
        """The prompt, while it is on its model."""
        prompt = self._prompt()
        return prompt if prompt is not None and prompt.is_attached else None

    def remove(self) -> None:
        """Leave the Accelerator as it was; called with the last prompt of the model."""
        for handle in self._handles:
            handle.remove()
        accelerator: Any = self._accelerator()
        if accelerator is None or accelerator.__dict__.get("save_model") != self.save_model:
            return
        if self._model_before is None:
            del accelerator.save_model
        else:
            accelerator.save_model = self._model_before

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
        """Write the prompt, and take the model's weights out of what accelerate is about to write."""
        prompt, accelerator = self.prompt, self._accelerator()
        if prompt is None or accelerator is None:
            return
        beside = around(_require_prepared(models, prompt), prompt.model)
        saver = self._saver(prompt)
        saver.optimizer = _optimizer_of(accelerator, prompt)
        require_same_on_all_ranks(prompt)
        if self.check_frozen:
            prompt.verify_frozen()
        del weights[_place_of(prompt, weights)]
        if _writes(accelerator):
            folder = self._folder(output_dir)
            prompt.save_pretrained(folder)
            write_live(folder, saver.state())
            if beside:
                write_tensors(folder / AROUND, {name: t.clone() for name, t in beside.items()}, {"format": "pt"})

    def save_model(self, model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Stand in for the Accelerator's `save_model`: of the prompted model, write the prompt; of any other, what it is."""
        prompt, accelerator = self.prompt, self._accelerator()
        if prompt is None or accelerator is None or not holds(model, prompt.model):
            self._save_model_before(model, save_directory, *args, **kwargs)
            return
        safe_serialization = args[1] if len(args) > 1 else kwargs.get("safe_serialization", True)
        beside = around(bare(model), prompt.model)
        if beside or not safe_serialization:
            raise TrainerError(
                "`save_model` of a prompted model writes the prompt, in safetensors, and nothing else.",
                "Call `prompt.save_pretrained(directory)`, and save what stands around the model by itself.",
                safe_serialization=safe_serialization,
                around=", ".join(list(beside)[:8]) or "nothing",
            )
        if _writes(accelerator):
            prompt.save_pretrained(save_directory)

    # --- load ---------------------------------------------------------------------------------------------------------

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        """Check a checkpoint, put it into the prompt, and spare accelerate the model."""
        prompt, accelerator = self.prompt, self._accelerator()
        if prompt is None or accelerator is None:
            return
        model, folder, saver = _require_prepared(models, prompt), self._folder(input_dir), self._saver(prompt)
        saver.optimizer = _optimizer_of(accelerator, prompt)
        state = read_tensors(folder / LIVE)[0] if (folder / LIVE).is_file() else {}
        saver.check(state)
        if not saver.loaded:
            raise TrainerError(
                "a run goes on from a checkpoint that holds its prompt.",
                "Load one that `save_state` wrote while the prompt was tracked.",
                checkpoint=folder,
                expected=LIVE,
            )
        beside = read_tensors(folder / AROUND)[0] if (folder / AROUND).is_file() else {}
        require_same(beside, around(model, prompt.model))
        prompt.model.load_state_dict(state, strict=False)
        model.load_state_dict(beside, strict=False)
        models[:] = [other for other in models if not holds(other, prompt.model)]
        require_same_on_all_ranks(prompt)


# --- what an Accelerator holds ----------------------------------------------------------------------------------------


def _writes(accelerator: Any) -> bool:
    each_node = accelerator.project_configuration.save_on_each_node
    return bool(accelerator.is_local_main_process if each_node else accelerator.is_main_process)


def _require_prepared(models: list[nn.Module], prompt: SoftPrompt) -> nn.Module:
    """The prepared model that holds the prompted one, without its wrappers.

    Raises:
        TrainerError: there is none.
    """
    for model in models:
        if holds(model, prompt.model):
            return bare(model)
    raise TrainerError(
        "a tracked prompt must be on a model that the Accelerator has prepared.",
        "Pass the model to `accelerator.prepare`, or remove the prompt.",
        prompt=f"{prompt.name!r} on {type(prompt.model).__name__}",
        prepared=", ".join(type(bare(model)).__name__ for model in models) or "none",
    )


def _place_of(prompt: SoftPrompt, weights: list[dict[str, Tensor]]) -> int:
    """Which of the state dicts that are about to be written is the prompted model's.

    Raises:
        TrainerError: not exactly one is.
    """
    own = {parameter.data_ptr() for parameter in prompt.parameters()}
    pointers = [{value.data_ptr() for value in state.values() if isinstance(value, Tensor)} for state in weights]
    found = [number for number, held in enumerate(pointers) if own & held]
    if len(found) == 1:
        return found[0]
    raise TrainerError(
        "the weights that accelerate is about to write must hold the prompt once, in its model.",
        "Let no other hook of `register_save_state_pre_hook` take them away before.",
        prompt=repr(prompt.name),
        found=f"{len(found)} times among the weights of {len(weights)} models",
    )


def _optimizer_of(accelerator: Any, prompt: SoftPrompt) -> str | None:
    """The name of the optimizer that holds a prompt; None while none is prepared."""
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in accelerator._optimizers]
    remedy = "Make the optimizer from `prompt.parameters()`, after `attach`, and pass it to `accelerator.prepare`."
    return require_held(optimizers, prompt, remedy) if optimizers else None

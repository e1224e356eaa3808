"""`SoftPromptCallback`: everything that an unmodified Trainer needs to train a prompt, and nothing else.

The prompt is attached at `on_init_end`, before the Trainer makes its optimizer. The model's `save_pretrained` is replaced on the
instance, so that checkpoints hold the prompt only; they resume through the Trainer's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from softhooks.attach import attach
from softhooks.errors import NameTakenError, TrainerError, explain
from softhooks.files import read_tensors, write_tensors
from softhooks.frozen import FrozenReport
from softhooks.method import Method
from softhooks.prompt import SoftPrompt, host_of

logger = logging.getLogger(__name__)

LIVE_FORMAT = "softhooks"
"""The `format` in a live file's metadata. `from_pretrained` knows it not, and so never takes a checkpoint for a model."""


class SoftPromptCallback(TrainerCallback):
    """Train a soft prompt with any Trainer: `Trainer(..., callbacks=[SoftPromptCallback(PromptTuning(20))])`.

    Checkpoints hold the prompt (`soft_prompt.*`, which `softhooks.load` reads) and its live parameters (`model.safetensors`, from
    which the Trainer resumes). `trainer.save_model()` writes the prompt only.

    Args:
        method: what to train.
        name: under which to attach it.
        train_head, trainable, freeze_dropout: as in `attach`.
        check_frozen: compare the digests of the base model at the end of training.

    Attributes:
        soft_prompt: the handle, from the construction of the Trainer on.
        report: what the check at the end of training has read.
    """

    def __init__(
        self,
        method: Method,
        *,
        name: str = "default",
        train_head: bool = True,
        trainable: str | Sequence[str] = (),
        freeze_dropout: bool = False,
        check_frozen: bool = True,
    ) -> None:
        self.method = method
        self.name = name
        self.check_frozen = check_frozen
        self.soft_prompt: SoftPrompt | None = None
        self.report: FrozenReport | None = None
        self._options: dict[str, Any] = {
            "train_head": train_head,
            "trainable": trainable,
            "freeze_dropout": freeze_dropout,
        }

    # --- events -------------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach before the Trainer makes its optimizer; a user's own optimizer is mended in place."""
        prompt = self._take(kwargs["model"])
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            mend_optimizer(optimizer, prompt)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the model and the optimizer that will train; mend what is new, refuse what is too late."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        known = self.soft_prompt is not None and self.soft_prompt.is_attached and self.soft_prompt.model is model
        if not known:
            self._refuse_late(args, state, "the model was made after the Trainer (`model_init`, `add_callback`)")
            if self.soft_prompt is not None:
                self._release(self.soft_prompt)
            self._take(model)
        assert self.soft_prompt is not None
        if not is_mended(optimizer, self.soft_prompt):
            self._refuse_late(args, state, "the optimizer does not hold exactly the prompt's parameters")
            mend_optimizer(optimizer, self.soft_prompt)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prove that nothing else moved."""
        if self.check_frozen and self.soft_prompt is not None:
            self.report = self.soft_prompt.verify_frozen()
            logger.info("%s: %d numbers trained; %s", self.name, self.soft_prompt.num_parameters, self.report)

    # --- the model ----------------------------------------------------------------------------------------------------

    def _take(self, model: nn.Module) -> SoftPrompt:
        """Attach to a model, or take up an equal prompt that it carries."""
        host = host_of(model)
        present = host.prompts.get(self.name) if host else None
        if present is not None and present.method != self.method:
            raise NameTakenError(
                explain(
                    "a second Trainer goes on with a prompt only if the method is equal.",
                    "Remove the other prompt, or give this callback another `name=`.",
                    attached=f"{self.name!r}: {present.method!r}",
                    asked=f"{self.name!r}: {self.method!r}",
                )
            )
        prompt = present if present is not None else attach(model, self.method, self.name, **self._options)
        if host is not None:
            host.active = self.name
        self.soft_prompt = prompt
        replace_saving(prompt)
        return prompt

    def _release(self, prompt: SoftPrompt) -> None:
        prompt.remove()
        self.soft_prompt = None

    def _refuse_late(self, args: TrainingArguments, state: TrainerState, what: str) -> None:
        """Refuse to attach where a step was taken already, or where other processes would not follow.

        Raises:
            TrainerError: training is resumed, or runs in several processes.
        """
        reason = (
            "training is resumed" if state.global_step else "there are several processes" if args.world_size > 1 else ""
        )
        if reason:
            raise TrainerError(
                explain(
                    "a prompt must be on the model when the Trainer is made, so that it is resumed and shared rightly.",
                    "Pass `model=` and `callbacks=[SoftPromptCallback(...)]` to the Trainer; with `model_init`, attach the "
                    "prompt inside it.",
                    found=what,
                    but=reason,
                )
            )


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups


def is_mended(optimizer: Any, prompt: SoftPrompt) -> bool:
    """Whether an optimizer holds the trainable parameters of a prompt, each once, and nothing else."""
    held = sorted(id(parameter) for group in _groups(optimizer) for parameter in group["params"])
    return held == sorted(id(parameter) for parameter in prompt.parameters())


def mend_optimizer(optimizer: Any, prompt: SoftPrompt) -> None:
    """Make an optimizer hold exactly what is trained: frozen parameters out, the prompt's into the first group.

    Groups stay, with their options, for schedulers count them.
    """
    wanted = {id(parameter): parameter for parameter in prompt.parameters()}
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in _groups(optimizer):
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                inner.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in wanted]
        for parameter in group["params"]:
            del wanted[id(parameter)]
    if not _groups(optimizer):
        raise TrainerError("an optimizer must have a parameter group to put the prompt into; it has none.")
    _groups(optimizer)[0]["params"].extend(wanted.values())


# --- saving -----------------------------------------------------------------------------------------------------------


def replace_saving(prompt: SoftPrompt) -> None:
    """Make the model's `save_pretrained` write its prompt, until the prompt is removed."""
    model = prompt.model
    saver = Saver(prompt, getattr(model, "save_pretrained", None), getattr(model, "load_adapter", None))
    prompt.host.override("save_pretrained", saver.save)
    if hasattr(model, "peft_config"):
        prompt.host.override("load_adapter", saver.load_adapter)
    live = live_tensors(prompt)
    # The Trainer compares this list with the keys that a checkpoint lacks, and then keeps quiet about them.
    prompt.host.override("_keys_to_ignore_on_save", [key for key in model.state_dict() if key not in live])


def live_tensors(prompt: SoftPrompt) -> dict[str, torch.Tensor]:
    """Everything that training has changed, by its name in the model."""
    return {name: parameter.detach() for name, parameter in prompt.named_parameters()}


class Saver:
    """What stands in for a model's `save_pretrained` while the callback trains it.

    Args:
        prompt: the prompt.
        save: the model's own method; a PEFT model's adapters are still saved by it.
        load_adapter: a PEFT model's own method.
    """

    def __init__(self, prompt: SoftPrompt, save: Any, load_adapter: Any) -> None:
        self.prompt = prompt
        self._save = save
        self._load_adapter = load_adapter

    def save(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write the prompt; into a Trainer's checkpoint also its live parameters, and no config."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        if hasattr(self.prompt.model, "peft_config"):
            self._save(str(folder))
        self.prompt.save_pretrained(folder)
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            write_tensors(folder / SAFE_WEIGHTS_NAME, live_tensors(self.prompt), {"format": LIVE_FORMAT})

    def load_adapter(self, model_id: str, *args: Any, **kwargs: Any) -> Any:
        """Load a PEFT model's adapter, and from the same checkpoint the live prompt."""
        result = self._load_adapter(model_id, *args, **kwargs)
        path = Path(model_id) / SAFE_WEIGHTS_NAME
        if path.is_file():
            tensors, metadata = read_tensors(path)
            if metadata.get("format") == LIVE_FORMAT:
                self.prompt.model.load_state_dict(tensors, strict=False)
        return result

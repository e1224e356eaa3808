"""Refuse to train a prompt that cannot be trained, was attached too late, or is missing."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.heads import find_heads
from softhooks.base_model.frozen_record import FrozenReport
from softhooks.errors import NameTakenError, TrainerError
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.runtime.added_tokens import chosen_ids
from softhooks.trainer.checkpoint import saver_of

logger = logging.getLogger(__name__)


class TrainingCallback(Protocol):
    """The members of `SoftPromptCallback` that other modules of this package use."""

    name: str
    method: Method
    soft_prompt: SoftPrompt | None

    @property
    def report(self) -> FrozenReport | None:
        """The result of the last check that the base has not changed."""

    def on_model_init(self, args: TrainingArguments, control: TrainerControl, model: nn.Module, trial: Any) -> None:
        """Attach the prompt to a model that `model_init` returned."""


# --- a prompt that is already attached --------------------------------------------------------------------------------


def check_equal(
    present: SoftPrompt,
    method: Method,
    *,
    train_head: bool,
    trainable: tuple[str, ...],
    train_added_tokens: bool | Sequence[int] | PreTrainedTokenizerBase = False,
    **_: Any,
) -> None:
    """Check that an attached prompt has this method and these options."""
    model = present.model
    names = [name for name, _ in model.named_parameters() if not is_prompt_key(name)]
    wanted = {name for pattern in trainable for name in fnmatch.filter(names, pattern)}
    held = {name for name, _ in present.named_parameters() if not is_prompt_key(name)}
    own_head = train_head and bool(find_heads(model, present.prompted_model.structure))
    rows = () if present.added is None else tuple(present.added.ids.tolist())
    asked = chosen_ids(train_added_tokens, model, present.prompted_model.structure)
    if present.method == method and held == wanted and bool(len(present.heads)) == own_head and rows == asked:
        return
    raise NameTakenError(
        f"the model already has a different prompt named {present.name!r}; training can only continue a prompt with the same "
        "method and options.",
        "Remove the other prompt, or give this callback another `name=`.",
        attached=f"{present.name!r}: {present.method!r}{_extras(len(present.heads), len(held), len(rows))}",
        asked=f"{present.name!r}: {method!r}{_extras(own_head, len(wanted), len(asked))}",
    )


def _extras(heads: int, parameters: int, rows: int) -> str:
    return (
        (", with its own head" if heads else "")
        + (f", with the rows of {rows} added tokens" if rows else "")
        + (f", with {parameters} parameters of the base" if parameters else "")
    )


def require_trainable_prompt(prompt: SoftPrompt, *, may_be_frozen: bool = False) -> None:
    """Check that a prompt has trainable parameters, or, with `may_be_frozen`, parameters that the caller will unfreeze."""
    if any(may_be_frozen or parameter.requires_grad for parameter in prompt.encoder.parameters()):
        return
    raise TrainerError(
        f"the prompt {prompt.name!r} has no trainable parameters.",
        "Load it with `trainable=True`.",
        prompt=f"{prompt.name!r}: {prompt.method!r}",
    )


def refuse_second(callback: TrainingCallback, model: nn.Module, control: TrainerControl) -> None:
    """Refuse a second SoftPromptCallback in the Trainer that `control` belongs to."""
    saver = saver_of(model)
    if saver is None or not saver.prompt.is_attached or saver.control is not control or saver.owner is callback:
        return
    first: Any = saver.owner
    raise TrainerError(
        "the Trainer has two SoftPromptCallbacks, but can train only one prompt.",
        first.remedy,
        first=f"{first.name!r}: {first.method!r}",
        second=f"{callback.name!r}: {callback.method!r}",
    )


def remove_previous(callback: TrainingCallback, model: nn.Module, trial: Any) -> None:
    """Remove a callback's earlier prompts from its previous model and from `model`, which may have been used before.

    Args:
        model: the model that `model_init` returned.
        trial: the trial of a hyperparameter search, or None outside a search.
    """
    known, saver = callback.soft_prompt, saver_of(model)
    if known is not None and known.model is not model:
        known.remove()
    if saver is None or saver.owner is not callback or not saver.prompt.is_attached:
        return
    if saver.attached_by_owner:
        saver.prompt.remove()
    elif saver.has_trained and trial is not None:
        raise TrainerError(
            "`model_init` returned a model with a prompt that another trial has trained; each trial needs a new prompt.",
            "Return a model without this prompt from `model_init` (the callback attaches one), or attach a new prompt there.",
            trial=getattr(trial, "number", trial),
            prompt=f"{saver.prompt.name!r}, attached by the script",
        )


@contextmanager
def detached_on_error(model: nn.Module) -> Iterator[None]:
    """If the `with` block raises an error, remove the prompt that a callback attached in it."""
    before = saver_of(model)
    try:
        yield
    except BaseException:
        saver = saver_of(model)
        if saver is not None and saver is not before and saver.attached_by_owner:
            saver.prompt.remove()
        raise


# --- a prompt that was attached too late or is missing ----------------------------------------------------------------


def refuse_late(args: TrainingArguments, state: TrainerState, found: str) -> None:
    """Refuse a prompt attached after the optimizer was created, if training is resumed, is distributed or writes checkpoints."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    reasons = {
        "training is resumed": bool(state.global_step),
        "training is distributed": args.world_size > 1,
        f"the Trainer could not resume from its checkpoints (save_strategy={strategy!r})": strategy != "no",
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        raise TrainerError(
            "the prompt was attached after the optimizer was created; it must be attached before.",
            "Pass `model=` or `model_init=`, and `callbacks=[SoftPromptCallback(...)]`, to the Trainer, or call "
            "`trainer.add_callback` before `train()`. In a new run with one process, save_strategy='no' "
            "(no checkpoints) also avoids this error.",
            found=found,
            because=reason,
        )


def require_loaded(state: TrainerState, name: str, loaded: bool) -> None:
    """Check that a resumed run has loaded its prompt from the checkpoint."""
    if state.global_step and not loaded:
        raise TrainerError(
            f"the checkpoint of step {state.global_step} has no prompt named {name!r}, so training cannot be resumed from it.",
            "Resume from a checkpoint that this callback wrote, under the same name.",
        )


def require_present(prompt: SoftPrompt | None, name: str, state: TrainerState) -> SoftPrompt:
    """Check before a step that the prompt is attached; otherwise, the whole model or nothing would train."""
    if prompt is None or not prompt.is_attached:
        raise TrainerError(
            f"the prompt {name!r} is not attached at step {state.global_step + 1}; it must stay attached during training.",
            "Pass the callback to the Trainer in `callbacks=[...]`; remove the prompt after `train()`.",
        )
    return prompt


# --- the Trainer's arguments ------------------------------------------------------------------------------------------


def refuse_smoothing(args: TrainingArguments, method: Method) -> None:
    """Refuse label smoothing for a method with its own objective, because the smoothed loss would replace the objective."""
    if args.label_smoothing_factor and method.objective() is not None:
        raise TrainerError(
            f"label_smoothing_factor={args.label_smoothing_factor} would replace the loss of the method {method.kind!r}.",
            "Set label_smoothing_factor to 0, and pass no `compute_loss_func`.",
        )


def warn_about_learning_rate(args: TrainingArguments, state: TrainerState, optimizer: Any, method: Method) -> None:
    """Warn if the optimizer has the default learning rate of the Trainer's arguments, with which a prompt hardly changes.

    A prefix that an MLP computes is an exception: its paper uses this learning rate.
    """
    group = optimizer.param_groups[0]
    rate = group.get("initial_lr", group.get("lr"))  # a scheduler has already changed `lr`
    is_default = rate == type(args).__dataclass_fields__["learning_rate"].default
    if is_default and state.is_world_process_zero and not getattr(method, "projection", False):
        logger.warning(
            "learning_rate=%s, the default of %s, hardly changes a soft prompt. Set it; start from 3e-2 for prompt tuning and "
            "prefix tuning (the table of methods in the README has all methods).",
            rate,
            type(args).__name__,
        )

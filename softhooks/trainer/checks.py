"""A prompt that is there already: whether a Trainer may go on with it, or has to leave it behind."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerControl

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.heads import find_heads
from softhooks.errors import NameTakenError, TrainerError
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.runtime.added_tokens import chosen_ids
from softhooks.trainer.checkpoint import saver_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from softhooks.method import Method
    from softhooks.prompt import SoftPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softhooks.trainer.callback import SoftPromptCallback


def check_equal(
    present: SoftPrompt,
    method: Method,
    *,
    train_head: bool,
    trainable: tuple[str, ...],
    train_added_tokens: bool | Sequence[int] | PreTrainedTokenizerBase = False,
    **_: Any,
) -> None:
    """Check that a prompt that is there already is what a callback would have attached.

    Raises:
        NameTakenError: it is another.
    """
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
        "a Trainer goes on with a prompt only if method and options are equal.",
        "Remove the other prompt, or give this callback another `name=`.",
        attached=f"{present.name!r}: {present.method!r}{_besides(len(present.heads), len(held), len(rows))}",
        asked=f"{present.name!r}: {method!r}{_besides(own_head, len(wanted), len(asked))}",
    )


def _besides(heads: int, parameters: int, rows: int) -> str:
    head = ", with its own head" if heads else ""
    head += f", with the rows of {rows} added tokens" if rows else ""
    return head + (f", with {parameters} parameters of the base" if parameters else "")


def refuse_done(prompt: SoftPrompt) -> None:
    """Refuse a prompt that has nothing to train.

    Raises:
        TrainerError: its encoder has no parameters.
    """
    if next(prompt.encoder.parameters(), None) is None:
        raise TrainerError(
            "a Trainer goes on only with a prompt that has parameters; this one is folded for good.",
            "Load it with `trainable=True`.",
            prompt=f"{prompt.name!r}: {prompt.method!r}",
        )


def refuse_resting(prompt: SoftPrompt) -> None:
    """Refuse to train a prompt of which nothing takes a gradient.

    Raises:
        TrainerError: it is frozen, or folded for good.
    """
    if not any(parameter.requires_grad for parameter in prompt.encoder.parameters()):
        raise TrainerError(
            "a prompt that trains must have parameters that do.",
            "Load it with `trainable=True`.",
            prompt=f"{prompt.name!r}: {prompt.method!r}",
        )


def refuse_second(callback: SoftPromptCallback, owner: tuple[Any, object], control: TrainerControl) -> None:
    """Refuse a callback beside another one of the same Trainer.

    Args:
        owner: the callback that trains the model's prompt, and the control of its Trainer.

    Raises:
        TrainerError: it is another one, and of the same Trainer.
    """
    first, its_control = owner
    if first is not callback and its_control is control:
        raise TrainerError(
            "a Trainer trains one prompt.",
            first.remedy,
            first=f"{first.name!r}: {first.method!r}",
            second=f"{callback.name!r}: {callback.method!r}",
        )


def leave_behind(callback: SoftPromptCallback, model: nn.Module, trial: Any) -> None:
    """Remove what a callback has trained on the last model that `model_init` made; if it makes the same again, from that.

    Raises:
        TrainerError: a trial would begin with what another has trained.
    """
    known, saver = callback.soft_prompt, saver_of(model)
    if known is not None and known.model is not model:
        known.remove()
    if saver is None or saver.owner[0] is not callback or not saver.prompt.is_attached:
        return
    if saver.made:
        saver.prompt.remove()
    elif saver.begun and trial is not None:
        raise TrainerError(
            "every trial of a search begins with a prompt that none has trained.",
            "Let `model_init` return a model without this prompt (the callback attaches it), or attach a new one inside.",
            trial=getattr(trial, "number", trial),
            prompt=f"{saver.prompt.name!r}, attached by the script and trained by another trial",
        )


@contextmanager
def bare_after_error(model: nn.Module) -> Iterator[None]:
    """Remove what a callback attaches if its Trainer is refused after that; a prompt that was there before stays."""
    before = saver_of(model)
    try:
        yield
    except BaseException:
        saver = saver_of(model)
        if saver is not None and saver is not before and saver.made:
            saver.prompt.remove()
        raise


def refuse_smoothing(args: TrainingArguments, method: Method) -> None:
    """Refuse a loss of the Trainer's own where the method has one.

    Raises:
        TrainerError: labels are to be smoothed.
    """
    if args.label_smoothing_factor and method.objective() is not None:
        raise TrainerError(
            "a method with an objective of its own trains on `output.loss`; the Trainer would put another loss in its place.",
            "Set label_smoothing_factor to 0, and pass no `compute_loss_func`.",
            method=method.kind,
            label_smoothing_factor=args.label_smoothing_factor,
        )

"""`SoftPromptCallback`: everything that an unmodified Trainer needs to train a prompt, and nothing else.

The prompt is attached at `on_init_end`, before the Trainer makes its optimizer. The model's `save_pretrained` is replaced on the
instance, so that checkpoints hold the prompt only; they resume through the Trainer's own code (`resume.py`).
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softhooks.attach import attach, frozen_names
from softhooks.errors import NameTakenError, TrainerError, explain
from softhooks.frozen import FrozenRecord, FrozenReport
from softhooks.heads import find_heads
from softhooks.host import CONTAINER
from softhooks.method import Method
from softhooks.optimizer import is_mended, mend_optimizer
from softhooks.prompt import SoftPrompt, host_of
from softhooks.resume import Saver, saver_of

logger = logging.getLogger(__name__)


class SoftPromptCallback(TrainerCallback):
    """Train a soft prompt with any Trainer: `Trainer(..., callbacks=[SoftPromptCallback(PromptTuning(20))])`.

    Checkpoints hold the prompt (`soft_prompt.*`, which `softhooks.load` reads) and its live parameters, from which the Trainer
    resumes bit for bit. `trainer.save_model()` writes the prompt only. Other prompts on the model rest while this one trains.

    A model that carries an equal prompt under this name already is taken up and trained on. With `model_init`, attach the prompt
    inside it if the run is to be resumed.

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
        self._resting: list[nn.Parameter] = []
        self._options: dict[str, Any] = {
            "train_head": train_head,
            "trainable": (trainable,) if isinstance(trainable, str) else tuple(trainable),
            "freeze_dropout": freeze_dropout,
        }

    # --- events -------------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach before the Trainer makes its optimizer; a user's own optimizer is mended in place."""
        prompt = self._take(kwargs["model"], control)
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            mend_optimizer(optimizer, prompt)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the model and the optimizer that will train; mend what is new, refuse what is too late."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        known = self.soft_prompt
        is_known = known is not None and known.is_attached and known.model is model
        if not is_known and not self._is_ready(model, optimizer):
            _refuse_late(args, state, "the model was made after the Trainer (`model_init`, `add_callback`)")
        if not is_known and known is not None:
            known.remove()
        saver = saver_of(model)
        has_loaded = saver is not None and saver.loaded
        prompt = self._take(model, control)
        if is_known and state.global_step and not has_loaded and not _is_sharded(args):
            raise TrainerError(
                explain(
                    "a resumed run must have loaded its prompt.",
                    "Resume from a checkpoint that this callback wrote, under the same name.",
                    trained=repr(self.name),
                    resumed=f"at step {state.global_step}, from a checkpoint without a prompt of that name",
                )
            )
        if saver is not None:
            saver.loaded = False
        if not is_mended(optimizer, prompt):
            _refuse_late(args, state, "the optimizer does not hold exactly the prompt's parameters")
            mend_optimizer(optimizer, prompt)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wake the model's other prompts, and prove that nothing else moved."""
        for parameter in self._resting:
            parameter.requires_grad_(True)
        self._resting.clear()
        if self.check_frozen and self.soft_prompt is not None:
            self.report = self.soft_prompt.verify_frozen()
            logger.info("%s: %d numbers trained; %s", self.name, self.soft_prompt.num_parameters, self.report)

    # --- the model ----------------------------------------------------------------------------------------------------

    def _take(self, model: nn.Module, control: TrainerControl) -> SoftPrompt:
        """Attach to a model, or take up an equal prompt that it carries; then only this prompt trains."""
        saver = saver_of(model)
        if saver is not None and saver.prompt.is_attached:
            self._refuse_second(saver.owner, control)
        host = host_of(model)
        present = host.prompts.get(self.name) if host else None
        if present is None:
            prompt = attach(model, self.method, self.name, **self._options)
        else:
            self._check_equal(present)
            prompt = present
        host = prompt.host
        host.active = self.name
        for other in host.prompts.values():
            for parameter in (*other.encoder.parameters(), *other.heads.parameters()):
                if other is not prompt and parameter.requires_grad:
                    self._resting.append(parameter)
                parameter.requires_grad_(other is prompt)
        if host.record is None:
            host.record = FrozenRecord(model, frozen_names(model))
        self.soft_prompt = prompt
        owned = saver is not None and saver.owner[0] is self and saver.owner[1] is control
        if saver is None or saver.prompt is not prompt or not owned:
            Saver(prompt, (self, control))
        return prompt

    def _is_ready(self, model: nn.Module, optimizer: Any) -> bool:
        """Whether a model that came late brought the prompt along, and the optimizer knows it."""
        host = host_of(model)
        present = host.prompts.get(self.name) if host else None
        return present is not None and is_mended(optimizer, present)

    def _refuse_second(self, owner: tuple[object, object], control: TrainerControl) -> None:
        callback, its_control = owner
        if callback is not self and its_control is control and isinstance(callback, SoftPromptCallback):
            raise TrainerError(
                explain(
                    "a Trainer trains one prompt.",
                    "Train the prompts one after the other, each with a Trainer of its own.",
                    first=f"{callback.name!r}: {callback.method!r}",
                    second=f"{self.name!r}: {self.method!r}",
                )
            )

    def _check_equal(self, present: SoftPrompt) -> None:
        """Check that a prompt that is there already is what this callback would have attached.

        Raises:
            NameTakenError: it is another.
        """
        model = present.model
        names = [name for name, _ in model.named_parameters() if not name.startswith(f"{CONTAINER}.")]
        wanted = {name for pattern in self._options["trainable"] for name in fnmatch.filter(names, pattern)}
        held = {name for name, _ in present.named_parameters() if not name.startswith(f"{CONTAINER}.")}
        own_head = self._options["train_head"] and bool(find_heads(model, present.host.anatomy))
        if present.method == self.method and held == wanted and bool(len(present.heads)) == own_head:
            return
        raise NameTakenError(
            explain(
                "a Trainer goes on with a prompt only if method and options are equal.",
                "Remove the other prompt, or give this callback another `name=`.",
                attached=f"{self.name!r}: {present.method!r}{_besides(len(present.heads), len(held))}",
                asked=f"{self.name!r}: {self.method!r}{_besides(own_head, len(wanted))}",
            )
        )


def _besides(heads: int, parameters: int) -> str:
    head = ", with its own head" if heads else ""
    return head + (f", with {parameters} parameters of the base" if parameters else "")


def _is_sharded(args: TrainingArguments) -> bool:
    """Whether something other than the Trainer itself loads checkpoints."""
    return bool(args.fsdp or args.deepspeed)


def _refuse_late(args: TrainingArguments, state: TrainerState, what: str) -> None:
    """Refuse to attach where a step was taken already, or where other processes would not follow.

    Raises:
        TrainerError: training is resumed, or runs in several processes.
    """
    reason = "training is resumed" if state.global_step else ""
    reason = reason or ("there are several processes" if args.world_size > 1 else "")
    if reason:
        raise TrainerError(
            explain(
                "a prompt must be on the model when the Trainer makes its optimizer, so that it is resumed and shared rightly.",
                "Pass `model=` and `callbacks=[SoftPromptCallback(...)]` to the Trainer; with `model_init`, attach the "
                "prompt inside it.",
                found=what,
                but=reason,
            )
        )

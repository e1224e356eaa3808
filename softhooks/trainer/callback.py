"""`SoftPromptCallback`: trains a soft prompt in an unmodified Trainer.

The prompt is attached in `on_init_end`, before the Trainer makes its optimizer. The model's `save_pretrained` is replaced, so
that checkpoints hold only the prompt; the Trainer's own code resumes from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softhooks.base_model.frozen_record import FrozenRecord, FrozenReport
from softhooks.compat.bitsandbytes import mark_trainable, require_trainable, unmark_trainable
from softhooks.compat.sharding import is_sharded_model
from softhooks.constraint import begin_step, end_step
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.runtime.attached_prompt import Injection
from softhooks.trainer import add_callback
from softhooks.trainer.attachment import attach_or_continue, present_prompt, saver_for
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of
from softhooks.trainer.derived_trainers import check_trainer, guard_trainer
from softhooks.trainer.frozen_check import CheckFrozen, FrozenCheck
from softhooks.trainer.incomplete_checkpoints import remove_links, rename_incomplete, replacement_links
from softhooks.trainer.launch import check_launch
from softhooks.trainer.model_init import patch_trainer
from softhooks.trainer.optimizer import is_mended, mend_optimizer, name_of, refuse_fused, require_gradient
from softhooks.trainer.other_prompts import FrozenPrompts
from softhooks.trainer.prompt_checks import (
    detached_on_error,
    refuse_late,
    refuse_second,
    refuse_smoothing,
    remove_previous,
    require_loaded,
    require_present,
)
from softhooks.trainer.ranks import broadcast_from_rank_0, require_same_on_all_ranks
from softhooks.trainer.sampling import use_sampler
from softhooks.trainer.template_rows import prepare_template_rows


class SoftPromptCallback(TrainerCallback):
    """Train a soft prompt with any Trainer: `Trainer(..., callbacks=[SoftPromptCallback(PromptTuning(20))])`.

    Checkpoints hold the prompt (`soft_prompt.*`, which `softhooks.load` reads) and its live parameters, from which the Trainer
    resumes bit for bit. `trainer.save_model()` writes only the prompt. The model's other prompts are frozen during training.
    Incomplete checkpoints of a killed process are renamed, so that `resume_from_checkpoint=True` finds the last complete one.

    Every training log has `soft_prompt/norm`, `soft_prompt/grad_norm` (after clipping), `soft_prompt/distance` (from the prompt
    as it was attached) and the method's own metrics. Reporters and the progress bar receive them together with the loss.

    If the model already has an equal prompt of this name, the callback continues to train it. Every model that `model_init`
    returns gets a new prompt. The callback may also be added later, with `trainer.add_callback`. To attach in time, the callback
    wraps `call_model_init` and `create_optimizer` of the Trainer instance.

    Args:
        method: the method to train.
        name: the name of the prompt.
        train_head, trainable, freeze_dropout, injection, train_added_tokens: as in `attach`.
        check_frozen: when to check that the base has not changed. "end": at the end of training; "save" or True: also before each
            checkpoint, so that no checkpoint is written with a changed base; "log": also at each log; False: never.
        model: the Trainer's model, if it is quantized. The prompt is then attached at once, because the Trainer accepts a
            quantized model only if some of its parameters can be trained.

    Attributes:
        soft_prompt: the attached prompt, or None before the Trainer is created.

    Raises:
        OptionError: `check_frozen` has any other value.
    """

    remedy: ClassVar[str] = "Train the prompts one after the other, each with its own Trainer."
    """What to do about a second callback on the same Trainer."""

    def __init__(
        self,
        method: Method,
        *,
        name: str = "default",
        train_head: bool = True,
        trainable: str | Sequence[str] = (),
        freeze_dropout: bool = False,
        injection: Injection | None = None,
        check_frozen: CheckFrozen = "save",
        model: nn.Module | None = None,
        train_added_tokens: bool | Sequence[int] | PreTrainedTokenizerBase = False,
    ) -> None:
        self.method = method
        self.name = name
        self.soft_prompt: SoftPrompt | None = None
        self._other_prompts = FrozenPrompts()
        self._links: list[Path] = []
        self._injection = injection
        self._is_sharded = False
        self._frozen_check = FrozenCheck(check_frozen)
        self._sampler: Any = None
        self._options: dict[str, Any] = {
            "train_head": train_head,
            "trainable": (trainable,) if isinstance(trainable, str) else tuple(trainable),
            "freeze_dropout": freeze_dropout,
            "train_added_tokens": train_added_tokens,
        }

        if model is not None:
            require_trainable(model)
            self.soft_prompt, _ = attach_or_continue(model, method, name, injection, self._options)
            mark_trainable(model, self.soft_prompt.prompted_model.patches)
        add_callback.users.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled callback, and register it for `trainer.add_callback`."""
        self.__dict__.update(state)
        add_callback.users.add(self)

    @property
    def report(self) -> FrozenReport | None:
        """The report of the last check of the base."""
        return self._frozen_check.report

    # --- events -------------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach the prompt before the Trainer creates its optimizer; an optimizer that the user passed is changed in place."""
        if self._options["train_added_tokens"] is True and hasattr(kwargs.get("processing_class"), "get_added_vocab"):
            self._options["train_added_tokens"] = kwargs["processing_class"]
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        self._check(args, model)
        if optimizer is None:
            refuse_fused(name_of(args))
        with args.main_process_first(local=args.save_on_each_node):
            if args.should_save:
                rename_incomplete(Path(str(args.output_dir)))
                self._links = replacement_links(Path(str(args.output_dir)))
        with detached_on_error(model):
            prompt = self._prepare(args, model, control)
            if optimizer is not None:
                mend_optimizer(optimizer, prompt)
        self._name_optimizer(args, optimizer)
        trainer = patch_trainer(self)
        if trainer is not None:
            prepare_template_rows(trainer, self.method)

    def on_model_init(self, args: TrainingArguments, control: TrainerControl, model: nn.Module, trial: Any) -> None:
        """Attach a prompt to a new model from `model_init`; called by the patched Trainer."""
        self.method = self.method_for(trial)
        self._check(args, model)
        remove_previous(self, model, trial)
        self._prepare(args, model, control)
        self._name_optimizer(args, None)

    def method_for(self, trial: Any) -> Method:
        """Return the method to train; `trial` is None outside a search. Subclasses may override this."""
        return self.method

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model and the optimizer of this run; attach the prompt to a new model, or refuse the model."""
        refuse_smoothing(args, self.method)
        model, optimizer, known = kwargs["model"], kwargs["optimizer"], self.soft_prompt
        is_known = known is not None and known.is_attached and known.model is model
        if not is_known:
            present = present_prompt(model, self.name)
            if present is None or not is_mended(optimizer, present):
                refuse_late(args, state, "a model or a callback that came without an event")
            if known is not None:
                known.remove()
            self._check(args, model)
        prompt = self._take(model, control)
        saver = saver_of(model)
        assert saver is not None
        if not is_known or state.is_hyper_param_search:  # a trial may have changed `args.optim`
            refuse_fused(name_of(args))
            self._name_optimizer(args, None)
        if not is_known:
            guard_trainer(args, prompt.prompted_model)
            saver.check_loaded_before()
        self._is_sharded = is_sharded_model(model)
        require_loaded(state, self.name, saver.loaded)
        saver.has_trained = True
        if not is_mended(optimizer, prompt):
            refuse_late(args, state, "an optimizer that does not hold exactly the prompt's parameters")
            mend_optimizer(optimizer, prompt)
        require_same_on_all_ranks(prompt)
        self._frozen_check.begin(prompt, state.global_step)
        prompt.prompted_model.embed_last()
        saver.verify = None if self._is_sharded else lambda: self._frozen_check.check(prompt, "save", state.global_step)
        seed = args.seed if args.data_seed is None else args.data_seed  # the seed with which the Trainer would shuffle
        self._sampler = use_sampler(kwargs.get("train_dataloader"), self.method, seed)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the method's own sampler, including in a run that resumes within an epoch."""
        if self._sampler is not None and state.epoch is not None:
            self._sampler.set_epoch(int(state.epoch + 1e-6))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients and keep them for the next log.

        Raises:
            TrainerError: the prompt was removed, or has no gradient.
        """
        prompt, saver = require_present(self.soft_prompt, self.name, state), self._saver
        remove_links(self._links)
        if saver is not None and saver.metrics is not None:
            saver.metrics.keep_gradients()
        require_gradient(prompt, state.global_step)
        begin_step(prompt.encoder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the method's constraint; this also covers optimizers from outside torch."""
        if self.soft_prompt is not None:
            end_step(self.soft_prompt.encoder)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the base if `check_frozen="log"`."""
        if "loss" in (kwargs.get("logs") or {}) and self.soft_prompt is not None:
            self._frozen_check.check(self.soft_prompt, "log", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Release the checkpoint's lock, and check the base on ranks where writing the checkpoint did not check it."""
        saver = self._saver
        if saver is None:
            return
        saver.finish()
        if not args.should_save or self._is_sharded:
            self._frozen_check.check(saver.prompt, "save", state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze the model's other prompts, and check that the ranks agree and the base has not changed."""
        if self.soft_prompt is not None:
            require_same_on_all_ranks(self.soft_prompt)
        self._other_prompts.unfreeze()
        prompt, saver = self.soft_prompt, self._saver
        if prompt is None or saver is None:
            return
        saver.loaded, saver.verify = False, None
        can_rescue = args.should_save and not self._is_sharded
        rescue = Path(str(args.output_dir)) / f"unproven-{state.global_step}" if can_rescue else None
        self._frozen_check.check(prompt, "end", state.global_step, rescue)
        if state.is_world_process_zero:
            tqdm.write(f"soft prompt {self.name!r}: {prompt.num_parameters:,} parameters trained; {self._frozen_check}")
        if state.is_hyper_param_search:
            self.soft_prompt = None  # release this trial's model; the next trial has its own

    # --- the model ----------------------------------------------------------------------------------------------------

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        """Check the launch and the settings before anything is attached."""
        check_launch(args, model, self.method)
        check_trainer(args, model, self.method, self._options["trainable"])

    def _prepare(self, args: TrainingArguments, model: nn.Module, control: TrainerControl) -> SoftPrompt:
        """Attach the prompt or continue with an equal one, and make it the same on all ranks."""
        prompt = self._take(model, control)
        guard_trainer(args, prompt.prompted_model)
        broadcast_from_rank_0(prompt, args.device)
        return prompt

    def _take(self, model: nn.Module, control: TrainerControl) -> SoftPrompt:
        """Attach the prompt or continue with an equal one, and freeze everything else on the model."""
        refuse_second(self, model, control)
        prompt, is_new = attach_or_continue(model, self.method, self.name, self._injection, self._options)
        shared = prompt.prompted_model
        unmark_trainable(model, shared.patches)
        shared.active = self.name
        self._other_prompts.freeze_all_but(prompt)
        if shared.record is None:
            shared.record = FrozenRecord(model)
        self.soft_prompt = prompt
        saver_for(prompt, self, control, is_new=is_new)
        return prompt

    @property
    def _saver(self) -> CheckpointSaver | None:
        """Return the saver of the callback's model, or None if another callback has taken over the model."""
        saver = None if self.soft_prompt is None else saver_of(self.soft_prompt.model)
        return saver if saver is not None and saver.owner is self else None

    def _name_optimizer(self, args: TrainingArguments, optimizer: Any) -> None:
        """Record the name of the optimizer, whose state the Trainer saves with the prompt."""
        saver = self._saver
        if saver is not None and not args.save_only_model:
            saver.optimizer = name_of(args) if optimizer is None else type(optimizer).__name__

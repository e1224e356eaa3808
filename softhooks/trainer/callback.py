"""`SoftPromptCallback`: trains a soft prompt in an unmodified Trainer.

The prompt is attached in `on_init_end`, before the Trainer creates its optimizer. The model's `save_pretrained` is replaced, so
that checkpoints contain only the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

from softhooks.base_model.frozen_record import FrozenRecord, FrozenReport
from softhooks.compat.bitsandbytes import mark_trainable, require_trainable, unmark_trainable
from softhooks.compat.sharding import is_sharded_model
from softhooks.constraint import begin_step, end_step
from softhooks.method import Method
from softhooks.model_card.training_run import TrainingRun
from softhooks.prompt import SoftPrompt
from softhooks.runtime.attached_prompt import Injection
from softhooks.trainer.attachment import FrozenPrompts, attach_or_continue, present_prompt, saver_for
from softhooks.trainer.batches import prepare_template_rows, use_sampler
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of
from softhooks.trainer.derived_trainers import check_trainer, guard_trainer
from softhooks.trainer.frozen_check import CheckFrozen, FrozenCheck
from softhooks.trainer.hub import PushedPrompt
from softhooks.trainer.incomplete_checkpoints import remove_links, rename_incomplete, replacement_links
from softhooks.trainer.launch import check_launch
from softhooks.trainer.optimizer import is_mended, mend_optimizer, name_of, refuse_fused, require_gradient
from softhooks.trainer.prompt_checks import (
    detached_on_error,
    refuse_late,
    refuse_second,
    refuse_smoothing,
    remove_previous,
    require_loaded,
    require_present,
    warn_about_learning_rate,
)
from softhooks.trainer.ranks import broadcast_from_rank_0, require_same_on_all_ranks
from softhooks.trainer.trainer_patches import callbacks, patch_trainer


class SoftPromptCallback(PushedPrompt):
    """Train a soft prompt with any Trainer: `Trainer(..., callbacks=[SoftPromptCallback(PromptTuning(20))])`.

    Checkpoints contain the prompt (`soft_prompt.*`, which `softhooks.load` reads) and its live parameters, from which the Trainer
    resumes bit for bit. `trainer.save_model()` writes only the prompt. If a process was killed while writing a checkpoint, the
    incomplete checkpoint is renamed, so that `resume_from_checkpoint=True` finds the last complete one.

    Every training log contains `soft_prompt/norm`, `soft_prompt/grad_norm` (after clipping), `soft_prompt/distance` (from the
    prompt at the start of training) and the method's own metrics, for reporters and the progress bar.

    If the model already has a prompt with this name, method and options, the callback continues to train it. The model's other
    prompts are frozen during training. Every model that `model_init` returns gets a new prompt. `add_callback` works too.

    Args:
        method: the method and its options, such as `PromptTuning(20)`.
        name: the name of the prompt.
        train_head, trainable, freeze_dropout, injection, train_added_tokens: as in `attach`.
        example: as in `attach`; without it, a model that needs more than token ids is examined on a training row.
        check_frozen: when to check that the base has not changed. "end": at the end of training; "save" or True: also before each
            checkpoint is written; "log": also at each training log; False: never.
        model: the Trainer's model, only if it is quantized. The prompt is attached immediately, because the Trainer accepts a
            quantized model only if it has trainable parameters.

    Attributes:
        soft_prompt: the attached prompt, or None before the Trainer is created.

    Raises:
        OptionError: `check_frozen` has an invalid value.
    """

    remedy: ClassVar[str] = "Train the prompts one after the other, each with its own Trainer."
    """The remedy in the error for a second callback on the same Trainer."""

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
        example: Mapping[str, Any] | None = None,
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
            "example": example,
        }
        if model is not None:
            require_trainable(model)
            self.soft_prompt, _ = attach_or_continue(model, method, name, injection, self._options)
            mark_trainable(model, self.soft_prompt.prompted_model.patches)
        callbacks.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled callback, so that it can be passed to `trainer.add_callback`."""
        self.__dict__.update(state)
        callbacks.add(self)

    @property
    def report(self) -> FrozenReport | None:
        """The result of the last check that the base has not changed, or None before the first check."""
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
        """Return the method to attach; `trial` is None outside a hyperparameter search. Subclasses may override this."""
        return self.method

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model and the optimizer. Attach the prompt if the model was replaced, or raise an error if it is too late."""
        refuse_smoothing(args, self.method)
        model, optimizer, known = kwargs["model"], kwargs["optimizer"], self.soft_prompt
        is_known = known is not None and known.is_attached and known.model is model
        if not is_known:
            present = present_prompt(model, self.name)
            if present is None or not is_mended(optimizer, present):
                refuse_late(
                    args,
                    state,
                    "a model without the prompt, or an optimizer without its parameters",
                )
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
        warn_about_learning_rate(args, state, optimizer, self.method)
        require_same_on_all_ranks(prompt)
        self._frozen_check.begin(prompt, state.global_step)
        prompt.prompted_model.embed_last()
        saver.verify = None if self._is_sharded else lambda: self._frozen_check.check(prompt, "save", state.global_step)
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        prompt.training_run = TrainingRun.of(args, state.log_history, dataset)
        seed = args.seed if args.data_seed is None else args.data_seed  # the seed that the Trainer would shuffle with
        self._sampler = use_sampler(kwargs.get("train_dataloader"), self.method, seed)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the method's own sampler, even if training resumes in the middle of an epoch."""
        if self._sampler is not None and state.epoch is not None:
            self._sampler.set_epoch(int(state.epoch + 1e-6))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the prompt is attached and has a gradient, and store the gradients for the next log."""
        prompt, saver = require_present(self.soft_prompt, self.name, state), self._saver
        remove_links(self._links)
        if saver is not None and saver.metrics is not None:
            saver.metrics.store_gradients()
        require_gradient(prompt, state.global_step)
        begin_step(prompt.encoder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the method's constraint, unless the hook on torch optimizers has already applied it."""
        if self.soft_prompt is not None:
            end_step(self.soft_prompt.encoder)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the base has not changed, if `check_frozen="log"`."""
        if "loss" in (kwargs.get("logs") or {}) and self.soft_prompt is not None:
            self._frozen_check.check(self.soft_prompt, "log", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Release the checkpoint's lock. Check the base on ranks that did not check it before the checkpoint was written."""
        saver = self._saver
        if saver is None:
            return
        saver.finish()
        if not args.should_save or self._is_sharded:
            self._frozen_check.check(saver.prompt, "save", state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unfreeze the model's other prompts. Check that all ranks have the same prompt and that the base has not changed."""
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
        check_launch(args, model, self.method)
        check_trainer(args, model, self.method, self._options["trainable"])

    def _prepare(self, args: TrainingArguments, model: nn.Module, control: TrainerControl) -> SoftPrompt:
        """Attach the prompt, unless the model already has it, and copy it from rank 0 to all ranks."""
        prompt = self._take(model, control)
        guard_trainer(args, prompt.prompted_model)
        broadcast_from_rank_0(prompt, args.device)
        return prompt

    def _take(self, model: nn.Module, control: TrainerControl) -> SoftPrompt:
        """Attach the prompt, unless the model already has it, and freeze the rest of the model."""
        refuse_second(self, model, control)
        prompt, is_new = attach_or_continue(model, self.method, self.name, self._injection, self._options, self)
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
        """The `CheckpointSaver` of the callback's model, or None if another callback now trains the model."""
        saver = None if self.soft_prompt is None else saver_of(self.soft_prompt.model)
        return saver if saver is not None and saver.owner is self else None

    def _name_optimizer(self, args: TrainingArguments, optimizer: Any) -> None:
        """Record the name of the optimizer, unless checkpoints are saved without its state."""
        saver = self._saver
        if saver is not None and not args.save_only_model:
            saver.optimizer = name_of(args) if optimizer is None else type(optimizer).__name__

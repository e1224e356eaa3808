"""`SoftPromptCallback`: everything that an unmodified Trainer needs to train a prompt, and nothing else.

The prompt is attached at `on_init_end`, before the Trainer makes its optimizer. The model's `save_pretrained` is replaced on the
instance, so that checkpoints hold the prompt only; they resume through the Trainer's own code (`resume.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softhooks.attach import attach
from softhooks.base_model.digest import FrozenRecord, FrozenReport
from softhooks.base_model.frozen_names import frozen_names
from softhooks.base_model.gradients import SetAside
from softhooks.compat.bitsandbytes import admit, dismiss, require_trainable
from softhooks.compat.sharding import shards
from softhooks.constraint import begin_step, end_step
from softhooks.method import Method
from softhooks.methods.task_sampling import arrange
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import Saver, saver_of
from softhooks.trainer.checks import (
    bare_after_error,
    check_equal,
    leave_behind,
    refuse_done,
    refuse_second,
    refuse_smoothing,
)
from softhooks.trainer.frozen_check import CheckFrozen, Proof
from softhooks.trainer.log import Showing, Watch
from softhooks.trainer.model_init import expect, meet, refuse_late, require_loaded, require_present
from softhooks.trainer.optimizer import is_mended, mend_optimizer, name_of, refuse_fused, require_gradient
from softhooks.trainer.ranks import agree, check_launch, redirect, require_agreement, way_in
from softhooks.trainer.recovery import drop, set_aside, stand_ins
from softhooks.trainer.trl import check_framework, guard_framework


class SoftPromptCallback(TrainerCallback):
    """Train a soft prompt with any Trainer: `Trainer(..., callbacks=[SoftPromptCallback(PromptTuning(20))])`.

    Checkpoints hold the prompt (`soft_prompt.*`, which `softhooks.load` reads) and its live parameters, from which the Trainer
    resumes bit for bit. `trainer.save_model()` writes the prompt only. Other prompts on the model rest while this one trains.
    What a killed process has left half written is set aside, so that `resume_from_checkpoint=True` finds the last whole one.

    Every training log holds `soft_prompt/norm`, `soft_prompt/grad_norm` (after clipping), `soft_prompt/distance` (from where the
    prompt was attached) and what the method adds; reporters and the progress bar see them as they see the loss.

    A model that carries an equal prompt under this name already is taken up and trained on. Models that `model_init` makes get a
    new prompt each, and so does a Trainer that is given the callback after its construction (`add_callback`): on the Trainer's
    instance, `call_model_init` and `create_optimizer` are wrapped for that.

    Args:
        method: what to train.
        name: under which to attach it.
        train_head, trainable, freeze_dropout, injection, train_added_tokens: as in `attach`.
        check_frozen: when to compare the digests of the base model: at the "end" of training; also before each "save", so that no
            checkpoint is written beside a base that has moved (True means this); also at each "log"; or never, False.
        model: the Trainer's model, if it is quantized: the prompt is attached at once, for the Trainer takes such a model only
            with something trainable on it.

    Attributes:
        soft_prompt: the handle, from the construction of the Trainer on.

    Raises:
        OptionError: `check_frozen` is none of these.
    """

    remedy: ClassVar[str] = "Train the prompts one after the other, each with a Trainer of its own."
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
        self._resting: list[tuple[str, nn.Parameter]] = []
        self._set_aside = SetAside()
        self._stand_ins: list[Path] = []
        self._injection = injection
        self._is_sharded = False
        self._proof = Proof(check_frozen)
        self._sampler: Any = None
        self._options: dict[str, Any] = {
            "train_head": train_head,
            "trainable": (trainable,) if isinstance(trainable, str) else tuple(trainable),
            "freeze_dropout": freeze_dropout,
            "train_added_tokens": train_added_tokens,
        }

        if model is not None:
            require_trainable(model)
            self.soft_prompt = self._attach(model)
            admit(self.soft_prompt.model, self.soft_prompt.prompted_model.patches)
        expect(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled callback, and register it for the Trainers that are made later."""
        self.__dict__.update(state)
        expect(self)

    @property
    def report(self) -> FrozenReport | None:
        """What the last check of the base has read."""
        return self._proof.report

    # --- events -------------------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach before the Trainer makes its optimizer; a user's own optimizer is mended in place."""
        if self._options["train_added_tokens"] is True and hasattr(kwargs.get("processing_class"), "get_added_vocab"):
            self._options["train_added_tokens"] = kwargs["processing_class"]
        check_launch(args, kwargs["model"], self.method)
        check_framework(args, kwargs["model"], self.method, self._options["trainable"])
        optimizer = kwargs.get("optimizer")
        if optimizer is None:
            refuse_fused(name_of(args))
        with args.main_process_first(local=args.save_on_each_node):
            if args.should_save:
                set_aside(Path(str(args.output_dir)))
                self._stand_ins = stand_ins(Path(str(args.output_dir)))
        with bare_after_error(kwargs["model"]):
            guard_framework(args, (prompt := self._take(kwargs["model"], control)).prompted_model)
            agree(prompt, args.device)
            if optimizer is not None:
                mend_optimizer(optimizer, prompt)
        self._name_optimizer(args, optimizer)
        meet(self)

    def on_model_init(self, args: TrainingArguments, control: TrainerControl, model: nn.Module, trial: Any) -> None:
        """Attach to a model that `model_init` has made, for another training or another trial; no event of the Trainer's."""
        self.method = self.method_for(trial)
        check_launch(args, model, self.method)
        check_framework(args, model, self.method, self._options["trainable"])
        leave_behind(self, model, trial)
        guard_framework(args, (prompt := self._take(model, control)).prompted_model)
        agree(prompt, args.device)
        self._name_optimizer(args, None)

    def method_for(self, trial: Any) -> Method:
        """What to train in a trial of a search (None: outside of one); a subclass may choose."""
        return self.method

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the model and the optimizer that will train; mend what is new, refuse what is too late."""
        refuse_smoothing(args, self.method)
        model, optimizer, known = kwargs["model"], kwargs["optimizer"], self.soft_prompt
        is_known = known is not None and known.is_attached and known.model is model
        if not is_known:
            if not self._is_ready(model, optimizer):
                refuse_late(args, state, "a model or a callback that no event has announced")
            if known is not None:
                known.remove()
            check_launch(args, model, self.method)
            check_framework(args, model, self.method, self._options["trainable"])
        prompt = self._take(model, control)
        saver = saver_of(model)
        assert saver is not None
        if not is_known or state.is_hyper_param_search:  # a trial may have chosen the optimizer
            refuse_fused(name_of(args))
            self._name_optimizer(args, None)
        if not is_known:
            guard_framework(args, prompt.prompted_model)
            saver.recall()
        self._is_sharded = shards(model)
        require_loaded(state, self.name, saver.loaded)
        saver.begun = True
        if not is_mended(optimizer, prompt):
            refuse_late(args, state, "the optimizer does not hold exactly the prompt's parameters")
            mend_optimizer(optimizer, prompt)
        require_agreement(prompt)
        self._proof.begin(prompt, state.global_step)
        prompt.prompted_model.embed_last()
        saver.prove = None if self._is_sharded else lambda: self._proof.check(prompt, "save", state.global_step)
        seed = args.seed if args.data_seed is None else args.data_seed  # by which the Trainer would order its rows
        self._sampler = arrange(kwargs.get("train_dataloader"), self.method, seed)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the method's own order of rows which epoch it is, also where the run is resumed in its middle."""
        if self._sampler is not None and state.epoch is not None:
            self._sampler.set_epoch(int(state.epoch + 1e-6))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold on to the gradients, for the next log.

        Raises:
            TrainerError: somebody has removed the prompt, or no gradient has reached it.
        """
        prompt, saver = require_present(self.soft_prompt, self.name, state), self._saver
        drop(self._stand_ins)
        if saver is not None and saver.watch is not None:
            saver.watch.note_gradients()
        require_gradient(prompt, state.global_step)
        begin_step(prompt.encoder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Constrain the prompt, also where the optimizer is none of torch's."""
        if self.soft_prompt is not None:
            end_step(self.soft_prompt.encoder)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prove that nothing else has moved, where that is asked for so often."""
        if "loss" in (kwargs.get("logs") or {}) and self.soft_prompt is not None:
            self._proof.check(self.soft_prompt, "log", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is whole; the processes that did not write it prove that their own base has not moved.

        Where the base is sharded, all do that here: none can read the whole of it alone.
        """
        saver = self._saver
        if saver is None:
            return
        saver.finish()
        if not args.should_save or self._is_sharded:
            self._proof.check(saver.prompt, "save", state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wake the model's other prompts, and prove that ranks agree and nothing else moved."""
        if self.soft_prompt is not None:
            require_agreement(self.soft_prompt)
        for _, parameter in self._resting:
            parameter.requires_grad_(True)
        self._set_aside.restore(self._resting)
        self._resting.clear()
        prompt, saver = self.soft_prompt, self._saver
        if prompt is None or saver is None:
            return
        saver.loaded, saver.prove = False, None
        can_rescue = args.should_save and not self._is_sharded
        rescue = Path(str(args.output_dir)) / f"unproven-{state.global_step}" if can_rescue else None
        self._proof.check(prompt, "end", state.global_step, rescue)
        if state.is_world_process_zero:
            tqdm.write(f"soft prompt {self.name!r}: {prompt.num_parameters:,} numbers trained; {self._proof}")
        if state.is_hyper_param_search:
            self.soft_prompt = None  # the next trial brings a model of its own; this one must not stay in memory

    # --- the model ----------------------------------------------------------------------------------------------------

    def _take(self, model: nn.Module, control: TrainerControl) -> SoftPrompt:
        """Attach to a model, or take up an equal prompt that it carries; then only this prompt trains."""
        saver = saver_of(model)
        if saver is not None and saver.prompt.is_attached:
            refuse_second(self, saver.owner, control)
        prompted = prompted_model_of(model)
        present = soft_prompts_of(prompted).get(self.name) if prompted else None
        if present is None:
            prompt = self._attach(model)
        else:
            check_equal(present, self.method, **self._options)
            refuse_done(present)
            prompt = present
            redirect(prompt, way_in(self.method, self._injection))
        prompted = prompt.prompted_model
        dismiss(prompted.model, prompted.patches)
        prompted.active = self.name
        for other in prompted.prompts.values():
            for part in (other.encoder, other.heads):
                for name, parameter in part.named_parameters(f"{other.name}.{type(part).__name__}"):
                    if other is not prompt and parameter.requires_grad:
                        self._resting.append((name, parameter))
                    parameter.requires_grad_(other is prompt)
        self._set_aside.take(self._resting)
        if prompted.record is None:
            prompted.record = FrozenRecord(model, frozen_names(model))
        self.soft_prompt = prompt
        if saver is None or saver.prompt is not prompt or saver.owner[0] is not self:
            saver = Saver(prompt, (self, control))
            saver.watch, saver.made = Watch(prompt), present is None
            prompted.keep(Showing(saver), is_copied=False)
        saver.owner = (self, control)  # a Trainer that restores its callbacks' states has a new control
        return prompt

    @property
    def _saver(self) -> Saver | None:
        """What the callback keeps on the model, while the model's prompt is its own."""
        saver = None if self.soft_prompt is None else saver_of(self.soft_prompt.model)
        return saver if saver is not None and saver.owner[0] is self else None

    def _name_optimizer(self, args: TrainingArguments, optimizer: Any) -> None:
        """Tell what stands in for `save_pretrained` whose state is saved beside the prompt, unless none is."""
        saver = self._saver
        if saver is not None and not args.save_only_model:
            saver.optimizer = name_of(args) if optimizer is None else type(optimizer).__name__

    def _attach(self, model: nn.Module) -> SoftPrompt:
        injection = way_in(self.method, self._injection)
        return attach(model, self.method, self.name, injection=injection, **self._options)

    def _is_ready(self, model: nn.Module, optimizer: Any) -> bool:
        """Whether a model that came late brought the prompt along, and the optimizer knows it."""
        prompted = prompted_model_of(model)
        present = soft_prompts_of(prompted).get(self.name) if prompted else None
        return present is not None and is_mended(optimizer, present)

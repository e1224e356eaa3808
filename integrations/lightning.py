"""Lightning: a callback that trains a soft prompt in an unmodified `LightningModule`. It also works with `pytorch_lightning`.

`SoftPromptCallback` attaches the prompt in `setup`, before `configure_optimizers`, and removes frozen parameters from the
module's optimizers. Checkpoints do not contain the base; next to each local checkpoint (`epoch=0-step=4.ckpt`) is a directory
for `softhooks.load` (`epoch=0-step=4.prompt`). With `ckpt_path=`, training resumes bit for bit unless the model uses dropout,
because Lightning saves no random state. Leave `strict_loading` at its default, so that only the base may be missing from a
checkpoint. The callback adds only tensors to a checkpoint, so `torch.load(weights_only=True)` can read it.

`LightningModule.load_from_checkpoint` creates a module without callbacks, and fails because the base is missing from the
checkpoint. To make it restore the prompt, call this integration's `attach(self, method)` at the end of `__init__`; a
`SoftPromptCallback` then trains this prompt.

These raise an error: FSDP, DeepSpeed, XLA and tensor parallelism; `ddp_spawn` and notebook launchers, because the prompt is lost
when their processes end; weight averaging, which copies the model; a module that was compiled before its prompt was attached;
a `precision` that converts the base (load it in that precision); a method with its own objective on a model in evaluation mode;
models created in `configure_model` or the module's own `setup`; an optimizer without the prompt; a checkpoint of another method,
base or optimizer.

Example:
    import lightning
    from softhooks.integrations.lightning import SoftPromptCallback

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model.train()
        def training_step(self, batch, _):
            return self.model(**batch).loss
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    callback = SoftPromptCallback(softhooks.PromptTuning(20))
    trainer = lightning.Trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(Lit(), loader)

Versions tested: lightning 2.6.6, pytorch-lightning 2.6.6
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from softhooks.attach import attach as attach_to_model
from softhooks.errors import OptionError, SoftHooksError, TrainerError
from softhooks.integration_support.models import prompted_model_of, soft_prompts_of
from softhooks.integration_support.training import (
    CheckFrozen,
    FrozenCheck,
    FrozenReport,
    broadcast_from_rank_0,
    check_equal,
    drop_frozen,
    held_by,
    refuse_evaluation,
    require_gradient,
    require_held,
    require_same_on_all_ranks,
    require_trainable_prompt,
)
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._checkpoint_io import PromptFiles, prompt_files_of
from ._imports import create_at_first_use
from ._outer_module import OuterModule, find_model

__all__ = ["SoftPromptCallback", "attach"]

SoftPromptCallback: Any  # created at its first use, because it derives from classes of Lightning

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy"}
_UNSUPPORTED = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}


def _callback() -> type:
    return type("SoftPromptCallback", (_Callback, *_callbacks()), {"__doc__": _Callback.__doc__})


__getattr__ = create_at_first_use(__name__, SoftPromptCallback=_callback)


def _callbacks() -> list[type]:
    """Return the `Callback` of each imported Lightning package, or of the first installed package if none is imported."""
    found: list[type] = [sys.modules[name].Callback for name in PACKAGES if sys.modules.get(name)]
    if found:
        return found
    for name in PACKAGES:
        with contextlib.suppress(ModuleNotFoundError):
            return [import_module(name).Callback]
    raise SoftHooksError("Lightning is not installed.", 'Install it: pip install "softhooks[lightning]".')


def attach(
    module: Any,
    method: Method,
    name: str = "default",
    *,
    attribute: str | None = None,
    train_head: bool = True,
    trainable: str | Sequence[str] = (),
    freeze_dropout: bool = False,
) -> SoftPrompt:
    """Attach a prompt to the model in a LightningModule, so that the module can load checkpoints that lack the base.

    Args:
        module: the LightningModule.
        attribute: the path of the model in the module (`model`, `net.encoder`); None if it is the only transformers model.
        method, name, train_head, trainable, freeze_dropout: as in `softhooks.attach`. If the model already has a prompt with
            this name, method and options, that prompt is returned.

    Raises:
        TrainerError: there is no such model.
        AttachError: the prompt cannot be attached, or its name belongs to a different prompt. The model is unchanged.
    """
    path = find_model(module, attribute)
    model = module.get_submodule(path)
    patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    options: dict[str, Any] = {"train_head": train_head, "trainable": patterns, "freeze_dropout": freeze_dropout}
    prompted = prompted_model_of(model)
    prompt = soft_prompts_of(prompted).get(name) if prompted else None
    if prompt is not None:
        check_equal(prompt, method, **options)
    else:
        if getattr(module, "_compiler_ctx", None) is not None:
            raise TrainerError(
                f"the {type(module).__name__} is already compiled, and compiled code may run without the prompt.",
                "Attach the prompt before `torch.compile`.",
            )
        prompt = attach_to_model(model, method, name, **options)
    prompt.prompted_model.active = name
    OuterModule.of(prompt, module, path)
    return prompt


class _Callback:
    """Trains a soft prompt.

    Args:
        method: the method and its options, such as `PromptTuning(20)`.
        attribute: the path of the model in the LightningModule; None if it is the only transformers model.
        name: the name of the prompt; each callback of a Trainer needs a different name.
        train_head, trainable, freeze_dropout: as in `softhooks.attach`.
        check_frozen: when to check that the base has not changed. "end": at the end of training; "save" or True: also before
            each checkpoint; False: never.
        beside: whether to write a directory with the saved prompt next to each local checkpoint. Unless `name` is "default", it
            is part of the directory's name.

    Attributes:
        soft_prompt: the attached prompt, or None before `setup`.
        report: the result of the last check that the base has not changed.
    """

    def __init__(
        self,
        method: Method,
        *,
        attribute: str | None = None,
        name: str = "default",
        train_head: bool = True,
        trainable: str | Sequence[str] = (),
        freeze_dropout: bool = False,
        check_frozen: CheckFrozen = "save",
        beside: bool = True,
    ) -> None:
        self.method = method
        self.name = name
        self.attribute = attribute
        self.beside = beside
        self.outer: OuterModule | None = None
        self._detaches_on_error = False
        self._options = {"train_head": train_head, "trainable": trainable, "freeze_dropout": freeze_dropout}
        if check_frozen == "log":
            raise OptionError("check_frozen is 'log'; for Lightning, it must be 'end', 'save', True or False.")
        self._frozen_check = FrozenCheck(check_frozen)

    @property
    def soft_prompt(self) -> SoftPrompt | None:
        return None if self.outer is None else self.outer.prompt

    @property
    def report(self) -> FrozenReport | None:
        return self._frozen_check.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the prompt before a checkpoint is restored and the optimizers are created."""
        _refuse(trainer)
        for other in trainer.callbacks:
            if isinstance(other, _Callback) and other is not self and other.name == self.name:
                raise TrainerError(
                    f"two SoftPromptCallbacks of the Trainer have the name {self.name!r}; both would write the same files.",
                    "Give one of them another `name=`.",
                    first=f"{self.name!r} for {self.attribute!r}: {self.method!r}",
                    second=f"{other.name!r} for {other.attribute!r}: {other.method!r}",
                )
        path = find_model(pl_module, self.attribute)
        prompted = prompted_model_of(pl_module.get_submodule(path))
        self._detaches_on_error = prompted is None or self.name not in prompted.prompts
        prompt = attach(pl_module, self.method, self.name, attribute=path, **self._options)  # type: ignore[arg-type]
        self.outer = OuterModule.of(prompt, pl_module, path)
        if stage == "fit":
            require_trainable_prompt(prompt)
        self.outer.saver.described = None
        broadcast_from_rank_0(prompt, trainer.strategy.root_device)
        files = trainer.strategy.checkpoint_io
        if not any(layer.callback is self for layer in prompt_files_of(files)):
            trainer.strategy.checkpoint_io = PromptFiles(files, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        outer = self.outer
        assert outer is not None, "Lightning calls setup first"
        prompt, saver = outer.prompt, outer.saver
        refuse_evaluation(prompt.method, prompt.model)
        converts = "Lightning's `bf16-true` converts the model: use `bf16-mixed`, or load the model in bfloat16."
        self._frozen_check.begin(prompt, trainer.global_step, converts)
        remedy = "Create it from `self.parameters()` in `configure_optimizers`, not in `__init__`."
        saver.optimizer = require_held(trainer.optimizers, prompt, remedy)
        for optimizer in trainer.optimizers:
            drop_frozen(optimizer)
        saver.require_same_run(saver.described)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        prompt = self.soft_prompt
        assert prompt is not None, "Lightning calls setup first"
        if not prompt.is_attached:
            raise TrainerError(f"the prompt {prompt.name!r} was removed during training.", "Remove it after `fit`.")
        if held_by(optimizer) & {id(parameter) for parameter in prompt.encoder.parameters()}:
            require_gradient(prompt, trainer.global_step)
        self._detaches_on_error = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.soft_prompt is not None and self.soft_prompt.is_attached:
            require_same_on_all_ranks(self.soft_prompt)
            self._frozen_check.check(self.soft_prompt, "save", trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the prompt if softhooks raises an error before the first step."""
        if self._detaches_on_error and isinstance(exception, SoftHooksError) and self.soft_prompt is not None:
            self.soft_prompt.remove()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        prompt = self.soft_prompt
        assert prompt is not None, "Lightning calls setup first"
        require_same_on_all_ranks(prompt)
        rescue = Path(trainer.default_root_dir) / f"unproven-{trainer.global_step}" if trainer.is_global_zero else None
        self._frozen_check.check(prompt, "end", trainer.global_step, rescue)


# --- strategies, callbacks and optimizers of a Trainer ----------------------------------------------------------------


def _kinds(thing: object) -> set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}


def _refuse(trainer: Any) -> None:
    strategy = trainer.strategy
    if not _kinds(strategy) & _SUPPORTED or _kinds(strategy) & _UNSUPPORTED:
        raise TrainerError(
            f"{type(strategy).__name__} is not supported; each process must hold the whole model.",
            "Use one device or `strategy='ddp'`; for FSDP2, use the Trainer of transformers.",
        )
    if "_MultiProcessingLauncher" in _kinds(strategy.launcher):
        raise TrainerError(
            f"{type(strategy).__name__} with spawned or forked processes is not supported; the prompt is lost when they end.",
            "Use `strategy='ddp'`, which runs the script in each process.",
        )
    for callback in trainer.callbacks:
        if _kinds(callback) & _AVERAGING:
            raise TrainerError(
                f"{type(callback).__name__} is not supported, because averaging copies the model with its hooks.",
                "Remove the callback.",
            )

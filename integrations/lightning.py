"""Lightning: a callback that lets an unmodified `LightningModule` train a soft prompt, and checkpoints that hold no base.

`SoftPromptCallback` attaches in `setup`, before `configure_optimizers`, to the one transformers model of the module, or to
that which `attribute=` names. Whatever optimizer is made then loses what is frozen. Checkpoints leave the base out: a few
kilobytes, and beside each local one (`epoch=0-step=4.ckpt`) a directory that `softhooks.load` reads
(`epoch=0-step=4.prompt`). `ckpt_path=` restores them bit for bit (but dropout: Lightning saves no random numbers), and
strictly: only the base may be missing, so leave `strict_loading` as it is. What the callback adds to a checkpoint is tensors,
which `torch.load(weights_only=True)` reads. At each checkpoint, and at the end, the base is proven to have its bits.

`Lit.load_from_checkpoint` makes a module without its callbacks: call `attach(self, method)` of this module at the end of
`__init__`, and it restores the prompt; the callback takes up the prompt that it finds. Without that it refuses, for the base
is missing.

Refused: FSDP, DeepSpeed, XLA and tensor parallelism; `ddp_spawn` and notebooks' processes, which take the prompt with them;
weight averaging, which copies the model; a module compiled before its prompt; precisions that convert the base (load it in
that one); a model in evaluation mode whose method has an objective; models made in `configure_model` or the module's own
`setup`; an optimizer without the prompt; a checkpoint of another method, base or optimizer. The same callback serves
`pytorch_lightning`.

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
import importlib
import sys
from collections.abc import Sequence
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

from ._carrier import Carrier, find_model
from ._checkpoint_io import PromptFiles, layers_of

__all__ = ["SoftPromptCallback", "attach"]

SoftPromptCallback: Any  # made by `__getattr__`

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_KNOWN = {"SingleDeviceStrategy", "DDPStrategy"}
_UNKNOWN = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}


def __getattr__(name: str) -> Any:
    """Build the callback when it is asked for: it is a callback of whichever Lightning is there."""
    if name != "SoftPromptCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    members = {"__module__": __name__, "__doc__": _Callback.__doc__}
    globals()[name] = built = type(name, (_Callback, *_callbacks()), members)
    return built


def _callbacks() -> list[type]:
    """The `Callback` of each Lightning that is loaded; of the first that is installed, if none is."""
    for names in ([name for name in PACKAGES if name in sys.modules], PACKAGES):
        found: list[type] = []
        for name in names:
            with contextlib.suppress(ModuleNotFoundError):
                found.append(importlib.import_module(name).Callback)
            if found and names is PACKAGES:
                break
        if found:
            return found
    raise SoftHooksError('SoftPromptCallback needs Lightning: pip install "softhooks[lightning]"')


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
    """Attach a prompt to a LightningModule's model, and let the module load checkpoints that leave the base out.

    Args:
        module: the LightningModule.
        attribute: where its model stands (`model`, `net.encoder`); None: its only transformers model.
        method, name, train_head, trainable, freeze_dropout: as in `softhooks.attach`. An equal prompt that is there is taken up.

    Raises:
        TrainerError: the model cannot be told.
        AttachError, NameTakenError: the prompt cannot be attached, or another is there. The model is as it was.
    """
    path = find_model(module, attribute)
    model = module.get_submodule(path)
    patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    options: dict[str, Any] = {"train_head": train_head, "trainable": patterns, "freeze_dropout": freeze_dropout}
    prompted = prompted_model_of(model)
    present = soft_prompts_of(prompted).get(name) if prompted else None
    if present is not None:
        check_equal(present, method, **options)
        prompt = present
    else:
        if getattr(module, "_compiler_ctx", None) is not None:
            raise TrainerError(
                "attach a prompt to a LightningModule before `torch.compile`: compiled code may not see it."
            )
        prompt = attach_to_model(model, method, name, **options)
    prompt.prompted_model.active = name
    Carrier.of(prompt, module, path)
    return prompt


class _Callback:
    """Train a soft prompt with any Lightning Trainer: `Trainer(callbacks=[SoftPromptCallback(PromptTuning(20))])`.

    Args:
        method: what to train.
        attribute: where the LightningModule has its model; None: its only transformers model.
        name: under which to attach the prompt; several callbacks need a name each, and name their directories by it.
        train_head, trainable, freeze_dropout: as in `softhooks.attach`.
        check_frozen: when to compare the digests of the base: at the "end" of training; also before each "save".
        beside: write a directory that `softhooks.load` reads beside each local checkpoint.

    Attributes:
        soft_prompt: the handle, from `setup` on.
        report: what the last check of the base has read.
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
        self.carrier: Carrier | None = None
        self._may_undo = False
        self._options = {"train_head": train_head, "trainable": trainable, "freeze_dropout": freeze_dropout}
        if check_frozen == "log":
            raise OptionError("check_frozen must be 'end', 'save', True or False with Lightning; it is 'log'.")
        self._frozen_check = FrozenCheck(check_frozen)

    @property
    def soft_prompt(self) -> SoftPrompt | None:
        return None if self.carrier is None else self.carrier.prompt

    @property
    def report(self) -> FrozenReport | None:
        return self._frozen_check.report

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach before a checkpoint is restored and an optimizer is made."""
        _refuse(trainer)
        for other in trainer.callbacks:
            if isinstance(other, _Callback) and other is not self and other.name == self.name:
                raise TrainerError(
                    "each SoftPromptCallback of a Trainer needs a name of its own, by which its files are told apart.",
                    "Give one of them another `name=`.",
                    first=f"{self.name!r} for {self.attribute!r}: {self.method!r}",
                    second=f"{other.name!r} for {other.attribute!r}: {other.method!r}",
                )
        path = find_model(pl_module, self.attribute)
        prompted = prompted_model_of(pl_module.get_submodule(path))
        self._may_undo = prompted is None or self.name not in prompted.prompts
        prompt = attach(pl_module, self.method, self.name, attribute=path, **self._options)  # type: ignore[arg-type]
        self.carrier = Carrier.of(prompt, pl_module, path)
        if stage == "fit":
            require_trainable_prompt(prompt)
        self.carrier.saver.described = None
        broadcast_from_rank_0(prompt, trainer.strategy.root_device)
        files = trainer.strategy.checkpoint_io
        if not any(layer.callback is self for layer in layers_of(files)):
            trainer.strategy.checkpoint_io = PromptFiles(files, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Meet the optimizers, and the model as Lightning has set it up."""
        carrier = self.carrier
        assert carrier is not None, "Lightning calls setup first"
        prompt, saver = carrier.prompt, carrier.saver
        refuse_evaluation(prompt.method, prompt.model)
        self._frozen_check.begin(prompt, trainer.global_step)
        remedy = "Make it from `self.parameters()` in `configure_optimizers`, not in `__init__`; what is frozen is taken out."
        saver.optimizer = require_held(trainer.optimizers, prompt, remedy)
        for optimizer in trainer.optimizers:
            drop_frozen(optimizer)
        saver.require_same_run(saver.described)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Refuse a step that would not train the prompt."""
        prompt = self.soft_prompt
        assert prompt is not None, "Lightning calls setup first"
        if not prompt.is_attached:
            raise TrainerError(f"the prompt {prompt.name!r} was removed while it trained; remove it after `fit`.")
        if held_by(optimizer) & {id(parameter) for parameter in prompt.encoder.parameters()}:
            require_gradient(prompt, trainer.global_step)
        self._may_undo = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Prove, on each rank, that ranks agree and nothing else moved; the base is left out when the file is written."""
        if self.soft_prompt is not None and self.soft_prompt.is_attached:
            require_same_on_all_ranks(self.soft_prompt)
            self._frozen_check.check(self.soft_prompt, "save", trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the model back as it was, where a run is refused before its first step."""
        if self._may_undo and isinstance(exception, SoftHooksError) and self.soft_prompt is not None:
            self.soft_prompt.remove()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prove that ranks agree and nothing else moved."""
        prompt = self.soft_prompt
        assert prompt is not None, "Lightning calls setup first"
        require_same_on_all_ranks(prompt)
        rescue = Path(trainer.default_root_dir) / f"unproven-{trainer.global_step}" if trainer.is_global_zero else None
        self._frozen_check.check(prompt, "end", trainer.global_step, rescue)


# --- what a Trainer holds ---------------------------------------------------------------------------------------------


def _kinds(thing: object) -> set[str]:
    return {kind.__name__ for kind in type(thing).__mro__}


def _refuse(trainer: Any) -> None:
    """Refuse, before anything is attached, what would train or save a prompt wrongly."""
    strategy = trainer.strategy
    if not _kinds(strategy) & _KNOWN or _kinds(strategy) & _UNKNOWN:
        raise TrainerError(
            "a prompt trains with Lightning where each process holds the whole model.",
            "Use one device, or `strategy='ddp'`; a transformers Trainer with SoftPromptCallback knows FSDP2.",
            strategy=type(strategy).__name__,
        )
    if "_MultiProcessingLauncher" in _kinds(strategy.launcher):
        raise TrainerError(
            "a prompt must outlive the processes that train it.",
            "Use `strategy='ddp'`, which starts the script anew in each process.",
            strategy=f"{type(strategy).__name__}, in processes that are spawned or forked",
        )
    for callback in trainer.callbacks:
        if _kinds(callback) & _AVERAGING:
            raise TrainerError(
                "weights cannot be averaged while a prompt trains: averaging copies the model, hooks and all.",
                "Leave the callback out.",
                callback=type(callback).__name__,
            )

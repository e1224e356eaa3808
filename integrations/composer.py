"""MosaicML Composer: an algorithm that attaches a prompt when the Trainer is created, and leaves the base out of checkpoints.

`SoftPromptAlgorithm` attaches a prompt to the model in the `HuggingFaceModel`, and changes the Trainer's optimizer to hold
exactly the prompt's parameters. Checkpoints contain only the trained tensors, and load with Composer's strict loading. Before
each step the algorithm checks that the prompt has a gradient, and at the end of `fit` that the base has not changed.

These raise an error: models that are not a `HuggingFaceModel` or already have a prompt; FSDP and tensor parallelism; several
optimizers; an optimizer that holds other parameters when `fit` begins; checkpoints without this prompt, or with a prompt of
another shape.

Composer requires versions of torch and torchvision that conflict with softhooks. This module is based on the source code of
mosaicml 0.32.1. Composer's Trainer was run by hand on a tiny model, with substitutes for torchvision and mcli, and resumed
training bit for bit. The tests run without Composer; they send the documented events to the algorithm.

Example:
    import softhooks
    from composer import Trainer
    from composer.models import HuggingFaceModel
    from softhooks.integrations.composer import SoftPromptAlgorithm

    algorithm = SoftPromptAlgorithm(softhooks.PrefixTuning(16))
    trainer = Trainer(
        model=HuggingFaceModel(model), optimizers=torch.optim.AdamW(model.parameters(), lr=5e-3),
        train_dataloader=loader, max_duration="2ep", algorithms=[algorithm], save_folder="checkpoints",
    )
    trainer.fit()
    algorithm.prompt.save_pretrained("prompt")

Versions tested: mosaicml 0.32.1, with a newer torch than it supports
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softhooks.attach import attach
from softhooks.errors import AttachError, TrainerError
from softhooks.integration_support.checkpoints import live_tensors
from softhooks.integration_support.models import prompted_model_of
from softhooks.integration_support.training import FrozenReport, mend_optimizer
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._imports import create_at_first_use, import_framework
from ._training_state import LivePrompt, require_optimizer

__all__ = ["SoftPromptAlgorithm"]

SoftPromptAlgorithm: Any  # created at its first use, because it derives from a class of Composer

_EVENTS = ("init", "after_load", "fit_start", "after_train_batch", "fit_end")


class _Events:
    """Attaches a prompt to the model of a Composer Trainer, and checks the prompt's gradient and the base.

    Args:
        method: the method and its options, such as `PromptTuning(20)`.
        options: other arguments of `softhooks.attach`: `name`, `train_head`, `freeze_dropout`, `injection`.
    """

    def __init__(self, method: Method, **options: Any) -> None:
        self.method = method
        self.options = options
        self._live: LivePrompt | None = None
        self._loaded: dict[str, Tensor] = {}

    @property
    def prompt(self) -> SoftPrompt:
        """The attached prompt, available once the Trainer is created."""
        return self._own.prompt

    @property
    def report(self) -> FrozenReport | None:
        """The report of the last check of the base."""
        return self._own.report

    def match(self, event: Any, state: Any) -> bool:
        return event.value in _EVENTS

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == "init":
            self._attach(state)
        elif event.value == "after_load" and self._loaded:
            # To create the optimizer's state, Composer has taken a step, which the method may have counted.
            self.prompt.model.load_state_dict(self._loaded, strict=False)
            self._loaded = {}
        elif event.value == "fit_start":
            self.prompt._require_attached()
            require_optimizer(self.prompt, state.optimizers[0])
        elif event.value == "after_train_batch":
            self._own.require_gradient(int(state.timestamp.batch))
        elif event.value == "fit_end":
            self._own.verify_frozen()

    @property
    def _own(self) -> LivePrompt:
        if self._live is None:
            raise TrainerError(
                "the prompt is not attached yet; Composer's Trainer attaches it when it is created with `algorithms=[...]`."
            )
        return self._live

    def _attach(self, state: Any) -> None:
        model = getattr(state.model, "model", None)
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TrainerError(
                f"the Trainer's model is a {type(state.model).__name__}; it must be a HuggingFaceModel.",
                "Wrap the model in composer.models.HuggingFaceModel.",
            )
        for name in ("fsdp_config", "tp_config"):
            if getattr(state, name, None) is not None:
                raise TrainerError(
                    f"the Trainer uses {name}; a prompt can be trained only in a single process or with DDP.",
                    "Leave `parallelism_config` out.",
                )
        optimizers = list(state.optimizers or ())
        if len(optimizers) != 1:
            raise TrainerError(
                f"the Trainer has {len(optimizers)} optimizers; to train a prompt, it must have exactly one.",
                "Pass one optimizer to the Trainer in `optimizers=`.",
            )
        present = prompted_model_of(model)
        if present is not None:
            raise AttachError(
                f"the model already has the prompt {', '.join(map(repr, present.prompts))}, and the algorithm would attach "
                "a second one.",
                "Remove the prompt before you create the Trainer.",
            )
        prompt = attach(model, self.method, **self.options)
        mend_optimizer(optimizers[0], prompt)
        self._live = LivePrompt(prompt, optimizers[0])
        patches = prompt.prompted_model.patches
        patches.keep(model.register_state_dict_post_hook(lambda *given: self._leave_out_base(*given)))
        patches.keep(model.register_load_state_dict_pre_hook(self._put_base_in))

    def _leave_out_base(self, model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Remove the base from the state dict of Composer's wrapper model."""
        kept = live_tensors(self.prompt)
        for name in [name for name in state if prefix and name.startswith(prefix)]:
            if name.removeprefix(prefix) not in kept:
                del state[name]

    def _put_base_in(self, model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Check that a checkpoint has the tensors of this prompt, and add the base's tensors, which strict loading needs."""
        if not prefix:  # the model's own `load_state_dict`, not that of Composer's wrapper model
            return
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own = live_tensors(self.prompt)
        wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
        foreign = sorted(set(found) - set(own))
        if wrong or foreign:
            raise TrainerError(
                f"the tensors in the checkpoint are not those of the prompt {self.prompt.name!r}; names and shapes must match.",
                "Resume with the method, the name and the options that wrote the checkpoint.",
                missing_or_of_another_shape=", ".join(wrong[:4]) or "none",
                unknown=", ".join(foreign[:4]) or "none",
            )
        self._loaded = {name: value.detach().clone() for name, value in found.items()}
        for name, tensor in model.state_dict().items():
            state.setdefault(prefix + name, tensor)


def _algorithm() -> type:
    base = import_framework("composer.core", "Composer (mosaicml)").Algorithm
    return type("SoftPromptAlgorithm", (_Events, base), {"__doc__": _Events.__doc__})


__getattr__ = create_at_first_use(__name__, SoftPromptAlgorithm=_algorithm)

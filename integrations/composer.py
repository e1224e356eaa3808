"""MosaicML Composer: an algorithm that attaches a prompt when the Trainer is made, and keeps the base out of its checkpoints.

`SoftPromptAlgorithm` attaches at `Event.INIT` to the model in the `HuggingFaceModel`, and mends the optimizer that the Trainer
was given: it holds the prompt's parameters then, and no others. The model's part of a checkpoint is what is trained; loading one
puts the base that is there beside it, so that strict loading is content. Before each step a gradient must have reached the
prompt; at `Event.FIT_END` the base must have the bits that it had.

Refused by name: models that are no `HuggingFaceModel`, or carry a prompt already; FSDP and tensor parallelism; other than one
optimizer, or one that holds other parameters when `fit` begins; checkpoints without this prompt, or with one of another shape.

Composer pins an older torch, and torchvision, which breaks transformers here. This was read from the source of mosaicml 0.32.1,
and its Trainer was run on a tiny model, and resumed bit for bit, with stand-ins for torchvision and mcli. The test suite has no
Composer: a stand-in calls the events in the documented order.

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

Versions tested: mosaicml 0.32.1, outside of its own range of versions
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from softhooks.attach import attach
from softhooks.errors import AttachError, SoftHooksError, TrainerError
from softhooks.integration_support.checkpoints import live_tensors
from softhooks.integration_support.models import prompted_model_of
from softhooks.integration_support.training import mend_optimizer
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._training_state import LivePrompt, require_optimizer

if TYPE_CHECKING:
    from softhooks.integration_support.training import FrozenReport

__all__ = ["SoftPromptAlgorithm"]

SoftPromptAlgorithm: Any  # made by `__getattr__`

_EVENTS = ("init", "after_load", "fit_start", "after_train_batch", "fit_end")


class _Events:
    """What the algorithm does at Composer's events; apart from Composer's class, which is there only when Composer is.

    Args:
        method: what to attach.
        options: further ones of `softhooks.attach`: `name`, `train_head`, `freeze_dropout`, `injection`.

    Attributes:
        prompt: the handle, from the construction of the Trainer on.
        report: what the last proof has read.
    """

    def __init__(self, method: Method, **options: Any) -> None:
        self.method = method
        self.options = options
        self._live: LivePrompt | None = None
        self._loaded: dict[str, Tensor] = {}

    @property
    def prompt(self) -> SoftPrompt:
        """The handle."""
        return self._own.prompt

    @property
    def report(self) -> FrozenReport | None:
        """What the last proof has read."""
        return self._own.report

    def match(self, event: Any, state: Any) -> bool:
        """Whether there is something to do."""
        return event.value in _EVENTS

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Do it."""
        if event.value == "init":
            self._attach(state)
        elif event.value == "after_load" and self._loaded:
            # Composer makes empty optimizer states by a step of its own, which a method may have counted.
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
            raise TrainerError("the prompt is attached when Composer's Trainer is made; give it the algorithm first.")
        return self._live

    def _attach(self, state: Any) -> None:
        model = getattr(state.model, "model", None)
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise _refusal(
                "model",
                type(state.model).__name__,
                "a HuggingFaceModel",
                "Wrap it in composer.models.HuggingFaceModel.",
            )
        for name in ("fsdp_config", "tp_config"):
            if getattr(state, name, None) is not None:
                raise _refusal("parallelism", name, "one process, or DDP", "Leave `parallelism_config` out.")
        optimizers = list(state.optimizers or ())
        if len(optimizers) != 1:
            raise _refusal("optimizers", len(optimizers), "one", "Give the Trainer one in `optimizers=`.")
        present = prompted_model_of(model)
        if present is not None:
            raise AttachError(
                f"the model must come without a prompt; it carries {', '.join(map(repr, present.prompts))}."
            )
        prompt = attach(model, self.method, **self.options)
        mend_optimizer(optimizers[0], prompt)
        self._live = LivePrompt(prompt, optimizers[0])
        prompt.prompted_model.patches.keep(
            model.register_state_dict_post_hook(lambda *given: self._leave_out_base(*given))
        )
        prompt.prompted_model.patches.keep(model.register_load_state_dict_pre_hook(self._put_base_in))

    def _leave_out_base(self, model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Keep of a state what is trained, where the model is part of a larger one: Composer's."""
        kept = live_tensors(self.prompt)
        for name in [name for name in state if prefix and name.startswith(prefix)]:
            if name.removeprefix(prefix) not in kept:
                del state[name]

    def _put_base_in(self, model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Check that a checkpoint is this prompt's, and let the base that is there stand beside it.

        Raises:
            TrainerError: it holds no such prompt, or one of another shape.
        """
        if not prefix:
            return
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own = live_tensors(self.prompt)
        wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
        foreign = sorted(set(found) - set(own))
        if wrong or foreign:
            raise TrainerError(
                "a checkpoint must hold what this prompt trains, name by name and shape by shape, and nothing else.",
                "Resume with the method, the name and the options that wrote it.",
                missing_or_of_another_shape=", ".join(wrong[:4]) or "none",
                unknown=", ".join(foreign[:4]) or "none",
            )
        self._loaded = {name: value.detach().clone() for name, value in found.items()}
        for name, tensor in model.state_dict().items():
            state.setdefault(prefix + name, tensor)


def _refusal(what: str, found: object, expected: str, remedy: str) -> TrainerError:
    return TrainerError(f"a prompt trains in Composer with {expected} ({what}).", remedy, found=found)


def _algorithm() -> type:
    try:
        from composer.core import Algorithm
    except ImportError as error:
        raise SoftHooksError(
            "this needs Composer; install `mosaicml` in an environment of its own, as it documents it, and softhooks beside it."
        ) from error
    return type("SoftPromptAlgorithm", (_Events, Algorithm), {"__module__": __name__, "__doc__": _Events.__doc__})


def __getattr__(name: str) -> Any:
    """Build what subclasses Composer's class when it is asked for, once."""
    if name != "SoftPromptAlgorithm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _algorithm())

"""Two mistakes in a training loop of one's own, told where they show: nothing takes a gradient, and nobody steps the prompt.

The first shows in the `backward` of a loss, the second in an optimizer's step: torch tells of every step of every optimizer, and
one hook listens while a prompt is attached anywhere.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softhooks.backbone.added_vocabulary import stack_level
from softhooks.errors import TrainerError, format_message
from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt
    from softhooks.runtime.prompted_model import PromptedModel


# --- a loss that reaches nothing --------------------------------------------------------------------------------------


class FrozenOutput(Tensor):
    """What a forward in which nothing takes a gradient returns: a loss, or logits and states that a loss is computed from.

    It is read as any other tensor; so is what is computed from it. A loss that also takes gradients from elsewhere goes backward.
    """

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, where torch would say that the tensor does not require grad.

        Raises:
            TrainerError: with what to do.
        """
        if not self.requires_grad:
            raise TrainerError(
                "a prompt that is to be trained must take gradients; everything in this forward is frozen.",
                "Load the prompt with `softhooks.load(model, path, trainable=True)`, before the optimizer is made.",
                loss="made of frozen parameters only",
            )
        super().backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, format_spec: str) -> str:
        """Format as a plain tensor: torch gives only those `f"{loss:.2f}"`."""
        return format(self.as_subclass(Tensor), format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Print as a plain tensor."""
        return repr(self.as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def tell_frozen(output: Any) -> Any:
    """Let a loss that is in a model's output, or is computed from it, say what is missing, should it go backward."""
    if type(output) is tuple:
        return tuple(map(_told, output))
    if isinstance(output, dict):
        for name, value in output.items():
            if (told := _told(value)) is not value:
                output[name] = told
        return output
    return _told(output)


def prompts_on(prompted: PromptedModel) -> list[AttachedPrompt]:
    """The prompts that are on, each once."""
    names = [prompted.active] if prompted.rows is None else prompted.rows
    return [prompted.prompts[name] for name in dict.fromkeys(names) if name is not None and name in prompted.prompts]


def takes_gradients(prompt: AttachedPrompt) -> bool:
    """Whether a prompt is not frozen."""
    return any(parameter.requires_grad for parameter in prompt.encoder.parameters())


def _told(value: Any) -> Any:
    plain = type(value) is Tensor and value.is_floating_point() and not value.requires_grad and not value.is_inference()
    return value.as_subclass(FrozenOutput) if plain else value


# --- an optimizer that does not hold the prompt -----------------------------------------------------------------------

_held_elsewhere: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[AttachedPrompt]] = weakref.WeakKeyDictionary()
"""Of optimizers the prompts that they, or others, hold, as far as that was looked up."""


def _listen(patches: Patches) -> None:
    if not patches:
        patches.keep(register_optimizer_step_post_hook(_after_step))


watched: SharedPatches[PromptedModel] = SharedPatches(_listen)
"""The hosts whose prompts must be stepped by whoever steps their model."""


def watch_steps(prompted: PromptedModel) -> None:
    """Tell of steps that leave the prompt where it is, until the last prompt is removed."""
    watched.add(prompted)


def unwatch_steps(prompted: PromptedModel) -> None:
    """Let a prompted go; with the last one, the hook."""
    watched.discard(prompted)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for prompted in watched:
        reached = [prompt for prompt in prompts_on(prompted) if _has_gradient(prompt.module.parameters())]
        if any(prompt not in _held_elsewhere.get(optimizer, ()) for prompt in reached):
            _require_held(prompted, optimizer, reached)


def _held(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _require_held(prompted: PromptedModel, optimizer: Optimizer, reached: list[AttachedPrompt]) -> None:
    """Refuse a step on a model whose prompt takes gradients and is in no optimizer; warn where it trains something else.

    Raises:
        TrainerError: the step trains nothing.
    """
    held = {id(parameter) for parameter in _held(optimizer)}
    own = [parameter for parameter in prompted.model.parameters() if id(parameter) in held]
    if not own:
        return
    forgotten = [prompt for prompt in reached if not _is_held(prompt, optimizer)]
    _held_elsewhere.setdefault(optimizer, weakref.WeakSet()).update(reached)
    if not forgotten:
        return
    trains = any(parameter.grad is not None for parameter in own)
    sentence = format_message(
        "an optimizer must hold the prompt's parameters; neither this one nor another one does, "
        + ("so the prompt is not trained." if trains else "so its step trains nothing."),
        "Make it after `softhooks.attach`, of `prompt.parameters()`.",
        optimizer=f"{type(optimizer).__name__} of {len(own)} parameters of {type(prompted.model).__name__}",
        prompt=", ".join(repr(prompt.name) for prompt in forgotten) + ", which has gradients",
    )
    if not trains:
        del _held_elsewhere[optimizer]  # say it at the next step too
        raise TrainerError(sentence)
    warnings.warn(sentence, UserWarning, stacklevel=stack_level())


def _is_held(prompt: AttachedPrompt, first: Optimizer) -> bool:
    """Whether an optimizer holds a parameter of a prompt that takes gradients: this one, or any other that is alive."""
    wanted = {id(parameter) for parameter in prompt.module.parameters() if parameter.grad is not None}
    if any(id(parameter) in wanted for parameter in _held(first)):
        return True
    others = (one for one in gc.get_objects() if issubclass(type(one), Optimizer))
    return any(id(parameter) in wanted for other in others for parameter in _held(other))


def _has_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)

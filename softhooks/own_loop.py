"""Two mistakes in a training loop of one's own, told where they show: nothing takes a gradient, and nobody steps the prompt.

The first shows in the `backward` of a loss, the second in an optimizer's step: torch tells of every step of every optimizer, and
one hook listens while a prompt is attached anywhere.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softhooks.errors import TrainerError, explain
from softhooks.objectives import with_loss
from softhooks.users import Users

if TYPE_CHECKING:
    from softhooks.host import Host


# --- a loss that reaches nothing --------------------------------------------------------------------------------------


class FrozenLoss(Tensor):
    """The loss of a forward in which nothing takes a gradient. It is read as any other; so are numbers made of it.

    A sum with a loss that does take gradients takes them, and goes backward as it would.
    """

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, where torch would say that the tensor does not require grad.

        Raises:
            TrainerError: with what to do.
        """
        if not self.requires_grad:
            raise TrainerError(
                explain(
                    "a prompt that is to be trained must take gradients; everything in this forward is frozen.",
                    "Load the prompt with `softhooks.load(model, path, trainable=True)`, before the optimizer is made.",
                    loss="made of frozen parameters only",
                )
            )
        super().backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def tell_frozen(output: Any) -> Any:
    """Let the loss in a model's output say what is missing, should it go backward."""
    loss: Any = None
    if isinstance(output, tuple):
        loss = output[0] if output else None
    elif isinstance(output, dict):
        loss = output.get("loss")
    if (
        type(loss) is not Tensor
        or loss.ndim
        or not loss.is_floating_point()
        or loss.requires_grad
        or loss.is_inference()
    ):
        return output
    return with_loss(output, loss.as_subclass(FrozenLoss), has_loss=True)


# --- an optimizer that does not hold the prompt -----------------------------------------------------------------------

_handle: Any = None
_fine: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those that step beside one that holds the prompt


def _stop_listening() -> None:
    global _handle
    if _handle is not None:
        _handle.remove()
        _handle = None


watched: Users[Host] = Users(_stop_listening)
"""The hosts whose prompts must be stepped by whoever steps their model."""


def watch_steps(host: Host) -> None:
    """Tell of steps that leave the prompt where it is, until the last prompt is removed."""
    global _handle
    with watched.lock:
        watched.add(host)
        if _handle is None:
            _handle = register_optimizer_step_post_hook(_after_step)


def unwatch_steps(host: Host) -> None:
    """Let a host go; with the last one, the hook."""
    watched.discard(host)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    held = _held(optimizer)
    if any(parameter.grad is not None for parameter in held) or optimizer in _fine:
        return  # it trains something
    for host in watched:
        _require_held(host, optimizer, {id(parameter) for parameter in held})


def _held(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _require_held(host: Host, optimizer: Optimizer, held: set[int]) -> None:
    """Refuse a step that trains nothing, of an optimizer that holds frozen parameters of the base and not the prompt.

    Raises:
        TrainerError: gradients have reached a prompt, and no optimizer holds it.
    """
    reached = [prompt.name for prompt in host.prompts.values() if _has_gradient(prompt._module.parameters())]
    own = [parameter for parameter in host.model.parameters() if id(parameter) in held]
    if not reached or not own or any(parameter.requires_grad for parameter in own):
        return
    wanted = {id(p) for name in reached for p in host.prompts[name]._module.parameters() if p.grad is not None}
    others = (one for one in gc.get_objects() if issubclass(type(one), Optimizer) and one is not optimizer)
    if any(id(parameter) in wanted for other in others for parameter in _held(other)):
        _fine.add(optimizer)
        return
    raise TrainerError(
        explain(
            "an optimizer must hold the prompt's parameters; this one holds frozen ones of the base, so its step trains nothing.",
            "Make it after `softhooks.attach`, of `prompt.parameters()`.",
            optimizer=f"{type(optimizer).__name__} of {len(own)} parameters of {type(host.model).__name__}",
            prompt=", ".join(map(repr, reached)) + ", which has gradients",
        )
    )


def _has_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)

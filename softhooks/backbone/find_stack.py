"""Find the text backbone (stack) of a model from module outputs in probe forwards, not from module names or classes.

A stack looks up token ids in an embedding and returns one state per token; each state depends on other tokens too. An embedding
layer also returns one state per token, but each depends only on its own token.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import relative_difference, seeded
from softhooks.errors import UnsupportedModelError
from softhooks.patching.patches import Patches


@dataclass(eq=False)
class ModuleCall:
    """One call to a module in a probe forward.

    Attributes:
        inputs: its tensor arguments.
        position_ids: its argument `position_ids`.
        start, end: the number of calls that had begun when this call began, and when it ended.
        occurrence: the number of earlier calls to the module.
        output: the returned value, which later modules may have changed in place.
        state: a copy of the first tensor in the output.
    """

    path: str
    module: nn.Module
    inputs: list[Tensor]
    position_ids: Any
    start: int
    occurrence: int
    end: int = -1
    output: Any = None
    state: Tensor | None = None

    @property
    def key(self) -> tuple[int, int]:
        """A key that is the same for corresponding calls in different forwards of the model."""
        return id(self.module), self.occurrence

    def contains(self, other: ModuleCall) -> bool:
        """Whether another call was made during this one."""
        return self.start < other.start and 0 <= other.end <= self.end

    def received(self, tensor: Tensor) -> bool:
        """Whether one of the tensor arguments equals the given tensor."""
        return any(t.dtype == tensor.dtype and t.shape == tensor.shape and torch.equal(t, tensor) for t in self.inputs)


def record(model: nn.Module, inputs: dict[str, Tensor]) -> list[ModuleCall]:
    """Run a model once, with a fixed random seed, and list the calls to its modules in the order in which they began."""
    calls: list[ModuleCall] = []
    running: list[ModuleCall] = []
    occurrences: Counter[nn.Module] = Counter()
    paths = {module: path for path, module in model.named_modules()}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        call = ModuleCall(paths[module], module, tensors, kwargs.get("position_ids"), len(calls), occurrences[module])
        occurrences[module] += 1
        calls.append(call)
        running.append(call)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        while running:  # calls that ended with an exception are still on top
            call = running.pop()
            if call.module is module:
                call.end, call.output = len(calls), output
                state = _first_tensor(output)
                call.state = None if state is None else state.clone()
                return

    with Patches() as patches, seeded(model):
        for module in paths:
            patches.keep(module.register_forward_pre_hook(before, with_kwargs=True))
            patches.keep(module.register_forward_hook(after))
        model(**inputs)
    return calls


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    try:
        first = output[0]
    except (TypeError, KeyError, IndexError):
        return None
    return first if isinstance(first, Tensor) else None


# --- choosing the stack among the calls -------------------------------------------------------------------------------

_ADAPTERS = "No prompt can enter this model; tune its weights with adapters such as LoRA."


def find_stack(
    model: nn.Module,
    name: str,
    ids: Tensor,
    inputs: dict[str, Tensor],
    calls: Sequence[ModuleCall],
    changed_calls: Sequence[ModuleCall],
) -> tuple[ModuleCall, ModuleCall, bool]:
    """Find the innermost module that contains the lookup of the ids and every module in which tokens influence one another.

    Args:
        name: the name of the stack. The states of an `encoder` may influence one another again in the decoder.
        ids: [B, T], as the stack receives them.
        inputs, calls: the arguments and module calls in the recorded forward.
        changed_calls: the module calls in another forward, in which only the second id differs.

    Returns:
        the call to the stack, the call to the embedding, and whether changing the second id leaves the first state unchanged.
    """
    reached = [call for call in calls if call.received(ids)]
    lookup = _lookup(model, reached)
    around = [call for call in reached if lookup is not None and call.contains(lookup)]
    changed = {call.key: call for call in changed_calls}
    stacks = [call for call in around if _mixes_tokens(call, changed, ids.shape)]
    if lookup is None or not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module that looks up token ids in an embedding and returns for each token a state "
            "that depends on other tokens too.",
            _ADAPTERS,
            found=_what_is_missing(lookup, around, name, ids),
        )
    candidates = dict.fromkeys([_inner_text_model(stacks[-1], lookup, calls, changed), *reversed(stacks)])
    chosen = next(
        (c for c in candidates if name == "encoder" or not _mixes_after(model, inputs, c, calls, changed)), None
    )
    if chosen is None:
        after = stacks[0].path or "the module that returns the states"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no single module that processes the whole text: tokens still influence one another "
            f"after {after}.",
            _ADAPTERS,
        )
    first, other = _state(chosen)[:, 0], _state(changed[chosen.key])[:, 0]
    return chosen, lookup, relative_difference(other, first) <= 1e-6


def _lookup(model: nn.Module, reached: Sequence[ModuleCall]) -> ModuleCall | None:
    """Choose the call that looks up the ids. If there are several, prefer that of `get_input_embeddings()`."""
    lookups = [call for call in reached if isinstance(call.module, nn.Embedding) and isinstance(call.output, Tensor)]
    named = model.get_input_embeddings()  # type: ignore[operator]
    return next((call for call in lookups if call.module is named), lookups[0] if lookups else None)


def _mixes_tokens(call: ModuleCall, changed: dict[tuple[int, int], ModuleCall], shape: Sequence[int]) -> bool:
    """Whether a module returns one state per token, and changing one token also changes the states of others."""
    twin = changed.get(call.key)
    if call.state is None or twin is None or twin.state is None:
        return False
    one, other = call.state, twin.state
    if one.dim() < 3 or one.shape[:2] != tuple(shape) or one.shape != other.shape or not one.is_floating_point():
        return False
    others = [column for column in range(one.shape[1]) if column != 1]
    return not torch.equal(one[:, others].nan_to_num(), other[:, others].nan_to_num())


def _inner_text_model(
    holder: ModuleCall, lookup: ModuleCall, calls: Sequence[ModuleCall], changed: dict[tuple[int, int], ModuleCall]
) -> ModuleCall:
    """Return the inner module that receives `inputs_embeds` (the text model of a vision-language model), else `holder`.

    The outer model must compute positions and masks from the ids without the prompt; softhooks adapts them to the prompt later.
    """
    shape = _state(holder).shape[:2]
    for call in reversed(calls):
        is_text_model = holder.contains(call) and call.received(lookup.output) and _mixes_tokens(call, changed, shape)
        if is_text_model and "inputs_embeds" in inspect.signature(call.module.forward).parameters:
            return call
    return holder


def _mixes_after(
    model: nn.Module,
    inputs: dict[str, Tensor],
    stack: ModuleCall,
    calls: Sequence[ModuleCall],
    changed: dict[tuple[int, int], ModuleCall],
) -> bool:
    """Change one state of a stack, and return whether the states of other tokens then change in later modules.

    If so, the stack is only the first part of the text model, such as convolutions over the embeddings.
    """
    later = [call for call in calls if call.contains(stack) or call.start >= stack.end]
    if not later:
        return False
    twin, occurrences = _state(changed[stack.key]), itertools.count()

    def change(_module: nn.Module, _args: Any, output: Any) -> None:
        state = _first_tensor(output)
        if next(occurrences) == stack.occurrence and state is not None:
            state[:, 1] = twin[:, 1]

    with Patches() as patches:
        patches.keep(stack.module.register_forward_hook(change))
        after_change = {call.key: call for call in record(model, inputs)}
    return any(_mixes_tokens(call, after_change, _state(stack).shape[:2]) for call in later)


def _state(call: ModuleCall) -> Tensor:
    assert call.state is not None  # checked by `_mixes_tokens`
    return call.state


def _what_is_missing(lookup: ModuleCall | None, around: Sequence[ModuleCall], name: str, ids: Tensor) -> str:
    ids_of = f"the {name}'s ids"
    if lookup is None:
        return f"no nn.Embedding that receives {ids_of} unchanged"
    states = [call.state for call in around if call.state is not None and call.state.dim() == 3]
    shorter = [state for state in states if state.shape[1] != ids.shape[1]]
    if shorter or not states:
        returned = [list(state.shape) for state in shorter or (call.state for call in around if call.state is not None)]
        return (
            f"only the embeddings return one state for each of {ids_of}, {list(ids.shape)}; "
            f"the other modules return {returned[-1]}"
        )
    if not all(bool(call.state.isfinite().all()) for call in around if call.state is not None):
        return "states that are not finite numbers"
    return f"each state after the embedding depends on only one of {ids_of}"

"""Find, in probe forwards, the stack that text runs through: by what modules do, not by what they are made of.

A stack looks the ids up and returns one state a token, which depends on the other tokens. Embeddings return one state a token
too, and may hold lists of modules, as MarkupLM's do; but each of their states depends on its own token alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.errors import UnsupportedModelError


@dataclass(eq=False)
class Call:
    """One module's call in a probe forward.

    Attributes:
        tensors: what it was given.
        began, ended: when, counted in calls.
        turn: how many calls of the same module came before.
        state: the first tensor of its output as it was returned; some modules add to it in place later.
    """

    path: str
    module: nn.Module
    tensors: list[Tensor]
    began: int
    turn: int
    ended: int = -1
    output: Any = None
    state: Tensor | None = None

    def holds(self, other: Call) -> bool:
        """Whether another call was made inside this one."""
        return self.began < other.began and 0 <= other.ended <= self.ended

    def given(self, tensor: Tensor) -> bool:
        """Whether a tensor was among what it was given."""
        return any(t.dtype == tensor.dtype and t.shape == tensor.shape and torch.equal(t, tensor) for t in self.tensors)


def record(model: nn.Module, inputs: dict[str, Tensor]) -> list[Call]:
    """Run a model once and note which modules were called with which tensors, in the order in which they began."""
    calls: list[Call] = []
    running: list[Call] = []
    turns: dict[int, int] = {}
    handles = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            turn = turns[id(module)] = turns.get(id(module), -1) + 1
            call = Call(path, module, tensors, began=len(calls), turn=turn)
            calls.append(call)
            running.append(call)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            while running:
                call = running.pop()
                if call.module is module:
                    call.ended, call.output = len(calls), output
                    state = _first_tensor(output)
                    call.state = None if state is None else state.clone()
                    return

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    try:
        first = output[0]
    except (TypeError, KeyError, IndexError):
        return None
    return first if isinstance(first, Tensor) else None


# --- which of the calls is the stack's --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The call of a stack and the lookup of the ids in it.

    Attributes:
        causal: whether its first state stays when the second token changes.
    """

    stack: Call
    lookup: Call
    causal: bool


def find_stack(
    model: nn.Module, name: str, ids: Tensor, inputs: dict[str, Tensor], calls: Sequence[Call], others: Sequence[Call]
) -> Found:
    """Find the innermost module that looks the ids up and returns states of tokens that depend on one another for good.

    Args:
        name: of the stack; that of an encoder has a decoder behind it.
        ids: [B, T], as the stack is given them.
        inputs: the arguments of a forward with these ids.
        calls: what was called in it.
        others: what was called in a forward in which nothing but the second column of the ids was another.

    Raises:
        UnsupportedModelError: there is no such module.
    """
    reached = [call for call in calls if call.given(ids)]
    lookup = _lookup(model, reached)
    around = [call for call in reached if lookup is not None and call.holds(lookup)]
    twins = {(id(call.module), call.turn): call for call in others}
    stacks = [call for call in around if _mixes(call, twins, ids.shape)]
    if lookup is None or not stacks:
        raise UnsupportedModelError(
            "a soft prompt needs a stack that looks token ids up in an embedding and returns one state a token, which "
            "depends on the other tokens.",
            "No prompt can enter this model; tune it with adapters on its weights, such as LoRA.",
            model=type(model).__name__,
            found=_what_is_missing(lookup, around, name, ids),
        )
    candidates = dict.fromkeys([_fed(stacks[-1], lookup, calls, twins), *reversed(stacks)])
    is_whole = (call for call in candidates if name == "encoder" or not _runs_on(model, inputs, call, calls, twins))
    chosen = next(is_whole, None)
    if chosen is None:
        raise UnsupportedModelError(
            "a soft prompt needs one stack that the text runs through as a whole.",
            "No prompt can enter this model; tune it with adapters on its weights, such as LoRA.",
            model=type(model).__name__,
            found=f"tokens still look at one another behind {stacks[0].path or 'what returns their states'}",
        )
    first, other = (_state(call)[:, 0].float() for call in (chosen, twins[id(chosen.module), chosen.turn]))
    return Found(chosen, lookup, causal=bool((first - other).abs().max() <= 1e-6 * first.abs().max().clamp(min=1e-6)))


def _lookup(model: nn.Module, reached: Sequence[Call]) -> Call | None:
    """The call that looked the ids up; a model that embeds them in several tables names the one for words."""
    lookups = [call for call in reached if isinstance(call.module, nn.Embedding) and isinstance(call.output, Tensor)]
    named = model.get_input_embeddings()  # type: ignore[operator]
    return next((call for call in lookups if call.module is named), lookups[0] if lookups else None)


def _mixes(call: Call, twins: dict[tuple[int, int], Call], shape: Sequence[int]) -> bool:
    """Whether a module returns one state a token, and states of other tokens than the one that has changed change too."""
    twin = twins.get((id(call.module), call.turn))
    if call.state is None or twin is None or twin.state is None:
        return False
    one, other = call.state, twin.state
    if one.dim() < 3 or one.shape[:2] != tuple(shape) or one.shape != other.shape or not one.is_floating_point():
        return False
    others = [column for column in range(one.shape[1]) if column != 1]
    return not torch.equal(one[:, others].nan_to_num(), other[:, others].nan_to_num())


def _fed(holder: Call, lookup: Call, calls: Sequence[Call], twins: dict[tuple[int, int], Call]) -> Call:
    """Find the stack inside that is given the embeddings, as a text model by the vision-language model around it.

    The model around it makes positions and masks of the ids, which must be made without the prompt and moved after.
    """
    shape = _state(holder).shape[:2]
    for call in reversed(calls):
        is_fed = holder.holds(call) and call.given(lookup.output) and _mixes(call, twins, shape)
        if is_fed and "inputs_embeds" in inspect.signature(call.module.forward).parameters:
            return call
    return holder


def _runs_on(
    model: nn.Module, inputs: dict[str, Tensor], stack: Call, calls: Sequence[Call], twins: dict[tuple[int, int], Call]
) -> bool:
    """Whether tokens look at one another behind a stack too: change one state on the way out, and see whether others follow.

    A front part of a model, such as convolutions over its embeddings, is no stack: virtual tokens would end there.
    """
    behind = [call for call in calls if call.holds(stack) or call.began >= stack.ended]
    if not behind:
        return False
    twin, turns = _state(twins[id(stack.module), stack.turn]), [-1]

    def change(_module: nn.Module, _args: Any, output: Any) -> None:
        turns[0] += 1
        state = _first_tensor(output)
        if turns[0] == stack.turn and state is not None:
            state[:, 1] = twin[:, 1]

    handle = stack.module.register_forward_hook(change)
    try:
        changed = {(id(call.module), call.turn): call for call in record(model, inputs)}
    finally:
        handle.remove()
    return any(_mixes(call, changed, _state(stack).shape[:2]) for call in behind)


def _state(call: Call) -> Tensor:
    assert call.state is not None  # `_mixes` has asked
    return call.state


def _what_is_missing(lookup: Call | None, around: Sequence[Call], name: str, ids: Tensor) -> str:
    ids_of = f"the {name}'s ids"
    if lookup is None:
        return f"no nn.Embedding that is given {ids_of} as they are"
    states = [call.state for call in around if call.state is not None and call.state.dim() == 3]
    fewer = [state for state in states if state.shape[1] != ids.shape[1]]
    if fewer or not states:
        returned = [list(state.shape) for state in fewer or (call.state for call in around if call.state is not None)]
        return (
            f"nothing but the embeddings returns one state for each of {ids_of}, {list(ids.shape)}, but {returned[-1]}"
        )
    if not all(bool(call.state.isfinite().all()) for call in around if call.state is not None):
        return "states that are not finite numbers"
    return f"no state around the embedding depends on another of {ids_of}"

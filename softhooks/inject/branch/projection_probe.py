"""Find the arguments for calling each attention module on one hidden state, and check the resulting keys and values."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.attention_interface import marked_sites
from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.probing import FORWARD_ERRORS, OTHER_METHOD, eval_mode, last_hidden_state, relative_difference
from softhooks.backbone.stack import AttentionCall, ModelStructure, Site, Stack
from softhooks.compat.offload import device_of
from softhooks.errors import UnsupportedMethodError
from softhooks.inject.branch.projections import keys_and_values
from softhooks.patching.patches import Patches

_PROBE_ID = 63


def find_attention_calls(structure: ModelStructure) -> None:
    """For each self-attention layer, set `Site.call`: the arguments for calling its attention module on one hidden state.

    Raises:
        UnsupportedMethodError: a stack neither uses transformers' attention interface nor has attention that softhooks rewrites.
    """
    encoded: Tensor | None = None
    for stack in structure.stacks:
        if not stack.takes_branches:
            raise UnsupportedMethodError(
                f"{type(stack.module).__name__} does not use transformers' attention interface; a gated branch needs it, or "
                "attention code that softhooks can rewrite.",
                OTHER_METHOD,
            )
        if all(site.call is not None for site in stack.sites_of("self")):
            continue
        if stack.probe_call:
            encoded = stack.probe_call.get("encoder_hidden_states")
        elif stack.name == "decoder":
            encoder = structure.entry
            with eval_mode(encoder.module), marked_sites(encoder), encoder.state.running(Pass(encoder)):
                encoded = last_hidden_state(encoder.module(input_ids=_one_id(encoder, structure.vocabulary)))
        seen = _watch(stack, structure.vocabulary, encoded) if stack.features is None else _watch_features(stack)
        with eval_mode(stack.module), marked_sites(stack):
            for site in stack.sites_of("self"):
                site.call = _find_call(site, seen[site.index])


@dataclass(eq=False)
class _Seen:
    """A call to one self-attention layer in a forward of one token.

    Attributes:
        around: the attention module, and the modules around it, from the inside out, with the arguments of this call.
        query, key, value: the arguments of the attention function.
        output: the output of the attention function.
        calls: the number of calls to the layer's module in the whole forward (several layers may share it).
    """

    around: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    query: Tensor
    key: Tensor
    value: Tensor
    output: Any
    calls: int = 0


class _WatchPass(Pass):
    """A forward that records every call to self-attention."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.around = _modules_around(stack)
        self.seen: dict[int, _Seen] = {}
        self.called: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call to an attention module, or to a module around one."""
        self.called.setdefault(module, []).append((args, dict(kwargs)))

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call to the attention function."""
        output = attention(*args, **kwargs)
        if site.role == "self":
            around = [
                (module, *self.called[module][-1]) for module in self.around[site.module] if module in self.called
            ]
            query, key, value = args[1:4]
            self.seen[site.index] = _Seen(around, query, key, value, output[0])
        return output


def _watch(stack: Stack, vocabulary: int, encoded: Tensor | None) -> dict[int, _Seen]:
    """Run one token through a stack, and return the call to each self-attention layer, by layer index."""
    inputs: dict[str, Any] = {"input_ids": _one_id(stack, vocabulary)}
    if encoded is not None:
        inputs["encoder_hidden_states"] = encoded
    return _run(stack, inputs).seen


def _watch_features(stack: Stack) -> dict[int, _Seen]:
    """Run a stack without token ids, and then each attention module on one of its tokens, as `_watch` does for a text."""
    whole, found = _run(stack, stack.probe_call).seen, {}
    for site in stack.sites_of("self"):
        found[site.index] = whole[site.index]
        for module, args, kwargs in whole[site.index].around:
            cut, named = [_one_token(value) for value in args], {name: _one_token(v) for name, v in kwargs.items()}
            alone = _WatchPass(stack)
            alone.has_begun = True  # only one module runs, not the stack
            with eval_mode(stack.module), marked_sites(stack), stack.state.running(alone), suppress(*FORWARD_ERRORS):
                alone.called[module] = [(tuple(cut), named)]
                module.forward(*cut, **named)
            if site.index in alone.seen:
                found[site.index] = alone.seen[site.index]
                found[site.index].calls = whole[site.index].calls
                break
    return found


def _one_token(value: Any) -> Any:
    """Reduce an argument of an attention module to one token.

    Hidden states, [1, T, H], become [1, 1, H]. The token with the largest state is kept, because the class token of an untrained
    model is zero. Masks, [1, .., T, K], become None. Other arguments are returned unchanged.
    """
    if not isinstance(value, Tensor) or value.dim() < 3:
        return value
    if value.dim() > 3:
        return None
    largest = int(value[0].float().norm(dim=-1).argmax())
    return value[:, largest : largest + 1]


def _run(stack: Stack, inputs: dict[str, Any]) -> _WatchPass:
    """Run a stack with a pass that records its self-attention."""
    forward_pass = _WatchPass(stack)
    with eval_mode(stack.module), marked_sites(stack), Patches() as hooks:
        for module in {part: None for parts in forward_pass.around.values() for part in parts}:
            hooks.keep(module.register_forward_pre_hook(forward_pass.note, with_kwargs=True))
        with stack.state.running(forward_pass):
            stack.module(**inputs)
    for seen in forward_pass.seen.values():
        seen.calls = len(forward_pass.called[seen.around[0][0]])
    return forward_pass


def _one_id(stack: Stack, vocabulary: int) -> Tensor:
    return torch.tensor([[min(_PROBE_ID, vocabulary - 1)]], device=device_of(stack.embedding))


def _modules_around(stack: Stack) -> dict[nn.Module, list[nn.Module]]:
    """For each self-attention module, return it and the modules that contain it, the innermost first, without the stack."""
    paths = {module: path.split(".") for path, module in stack.module.named_modules()}
    return {
        site.module: [
            stack.module.get_submodule(".".join(paths[site.module][:count]))
            for count in range(len(paths[site.module]), 0, -1)
        ]
        for site in stack.sites_of("self")
    }


def _find_call(site: Site, seen: _Seen) -> AttentionCall:
    """Find the innermost module that computes a site's keys and values from one sequence of hidden states.

    This is the attention module, or a module around it if the attention module gets several different sequences. If there is
    none, the result has the `failure` of the attention module.
    """
    calls = []
    for (module, args, kwargs), by_row in itertools.product(seen.around, (False, True)):
        calls.append(_attention_call(site, seen, module, args, kwargs, by_row))
        site.call = calls[-1]
        site.call.failure = _failure(site, site.call, seen, args, kwargs)
        if not site.call.failure:
            return site.call
    return calls[0]


def _attention_call(
    site: Site, seen: _Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], by_row: bool
) -> AttentionCall:
    """Turn a recorded call into arguments for other hidden states, without positions or a cache.

    If they are repeated for each row, other states among them are set to 0, so that keys that need them (LiLT) show as wrong.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    state, axis = next(((value, axis) for axis in (1, 2) for _, value in given if _is_state(value, axis)), (None, 1))
    # An attention module may get the same states as query, key and value (CTRL).
    places = [name for name, value in given if _is_state(value, axis) and _equal(value, state)]

    def kept(value: Any) -> Any:
        return torch.zeros_like(value) if by_row and _is_state(value, axis) else _nowhere(value)

    return AttentionCall(
        module=module,
        number=site.shared_sites.index(site) % max(len(site.shared_sites) // seen.calls, 1),
        width=0 if state is None else state.numel(),
        query_heads=seen.query.shape[1],
        args=[None if number in places else kept(value) for number, value in enumerate(args)],
        kwargs={name: None if name in places else kept(value) for name, value in kwargs.items()},
        places=places,
        axis=axis,
        by_row=by_row,
    )


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _is_state(value: Any, axis: int) -> bool:
    """Whether an argument is the hidden state of one token, with the tokens in dimension `axis`."""
    is_float = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return is_float and value.shape[0] == value.shape[axis] == 1


def _nowhere(value: Any) -> Any:
    """Replace a cache with None, and a rotary embedding with one that does not rotate; return other arguments unchanged."""
    if hasattr(value, "get_seq_length"):
        return None
    if isinstance(value, Tensor):
        return torch.ones_like(value) if value.is_complex() else value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        cosine, sine = value
        if cosine.shape == sine.shape and cosine.is_floating_point():
            return torch.ones_like(cosine), torch.zeros_like(sine)
    return value


def _failure(site: Site, call: AttentionCall, seen: _Seen, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Describe why a layer's keys and values for given hidden states are wrong; return an empty string if they are right.

    The recorded token is at position 0, where a rotation changes at most the scale of the key. So the value must be reproduced
    exactly, and the key up to a factor. A second hidden state in the batch must get a different key and value, and must not
    affect the first.
    """
    if not call.places:
        return "its input is not a sequence of hidden states"
    if len(site.shared_sites) % seen.calls:
        return f"it calls the attention function {len(site.shared_sites) / seen.calls:g} times"
    if getattr(seen.output, "shape", None) != (1, 1, call.query_heads, site.value_dim):
        return "its attention function does not return [B, T, heads, head size]"
    place = call.places[0]
    own: Tensor = (args[place] if isinstance(place, int) else kwargs[place]).reshape(1, -1)
    other = torch.arange(1.0, own.shape[-1] + 1, device=own.device).sin().to(own)[None]
    try:
        keys, values = keys_and_values(site, torch.cat([own, other]))
        alone = keys_and_values(site, other)
    except FORWARD_ERRORS as error:
        return f"it cannot run on hidden states alone: {type(error).__name__}: {error}"
    if keys.shape != (2, site.heads, site.key_dim) or values.shape != (2, site.heads, site.value_dim):
        return f"its keys {list(keys.shape)} and values {list(values.shape)} do not match two hidden states"
    if not _close(values[0], seen.value[0, :, 0]) or not _collinear(keys[0], seen.key[0, :, 0]):
        return "its keys and values depend on more than its input"
    if not _close(keys[1], alone[0][0]) or not _close(values[1], alone[1][0]) or torch.equal(*values):
        return "its keys and values for one hidden state depend on the others"
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance: float = 20 * torch.finfo(other.dtype).eps ** 0.9
    return relative_difference(one, other) <= tolerance


def _collinear(one: Tensor, other: Tensor) -> bool:
    factor = (one.double() * other.double()).sum() / (one.double() ** 2).sum().clamp(min=1e-30)
    return bool(factor > 0) and _close((one.double() * factor).to(other.dtype), other)

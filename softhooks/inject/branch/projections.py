"""Compute an attention module's keys and values for given hidden states, whatever projections the module has.

The module runs its own forward on each hidden state as a sequence of one token, without rotation, mask or cache, and a pass
records the arguments of its attention function. So separate, fused, biased and low-rank projections, key norms, and adapters on
them need no special code. `projection_probe` checks the recorded keys and values when a prompt is attached.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.stack import AttentionCall, Site, Stack
from softhooks.errors import UnsupportedMethodError
from softhooks.inject.branch.linear_scaling import Scaled, scale


class _FoundError(Exception):
    """Ends the forward of a module around an attention module, when the keys and values are found."""


class _ProjectionPass(Pass):
    """A pass that records the keys and the values of attention calls, and returns zeros.

    Args:
        last: the number of the attention call that ends the forward; None to let it run to its end.
    """

    def __init__(self, stack: Stack, scaled: Scaled, last: int | None) -> None:
        super().__init__(stack)
        self.has_begun = True  # only one module runs, not the stack
        self.scaled = scaled
        self.last = last
        self.found: list[tuple[Tensor, Tensor]] = []

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the keys and values, [N, Hk, 1, D]; there are more of them if attention to the encoder is merged in."""
        query, key, value = args[1:4]
        self.found.append((key, value))
        if self.last is not None and len(self.found) > self.last:
            raise _FoundError
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Scale the output of a linear layer, as in a forward pass on the text."""
        return scale(self.scaled, name, output)


def keys_and_values(site: Site, rows: Tensor, scaled: Scaled | None = None) -> tuple[Tensor, Tensor]:
    """Compute a layer's keys and values for hidden states. [N, H] -> [N, Hk, Dk], [N, Hk, Dv]."""
    call, stack = site.call, site.stack
    assert call is not None
    module = call.module
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    rows = rows if weight is None or weight.is_meta else rows.to(weight)
    args, kwargs = call.arguments(rows)
    # An exception ends the forward of a module around the attention module, so that no hook inside sees this call either.
    forward_pass = _ProjectionPass(stack, scaled or {}, None if module is site.module else call.number)
    with stack.state.running(forward_pass), suppress(_FoundError):
        # `forward` skips the module's hooks: a hook that collects attentions must not see this call.
        module.forward(*args, **kwargs)
    key, value = forward_pass.found[call.number]
    return key[:, :, 0], value[:, :, 0]  # T5Gemma 2 appends those of the encoder states


def require_call(site: Site) -> AttentionCall:
    """Return the arguments for calling an attention module on hidden states.

    Raises:
        UnsupportedMethodError: the module cannot be called on hidden states.
    """
    assert site.call is not None, "find_attention_calls comes first"
    if site.call.failure:
        raise UnsupportedMethodError(
            f"layer {site.index} cannot have a gated branch, because {site.call.failure}; the keys and values of a layer with a "
            "gated branch must depend only on the layer's input.",
            "Use another method, such as PrefixTuning, or leave out the lower layers with `num_layers`.",
            layer=f"{type(site.module).__name__}, number {site.index} of {site.stack.path or 'the model'}",
        )
    return site.call

"""Compute the keys and values of an attention module for given rows, independent of the form of its projections.

The module runs its own forward on each row as a sequence of one token, without rotation, mask or cache, and the arguments of its
attention function are recorded. Separate, fused, biased and low-rank projections, key norms, and adapters on any of them thus
need no special code. `projection_probe` checks at attach that this works.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.backbone.attention_call import AttentionCall
from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedMethodError
from softhooks.inject.branch.linear_scaling import Scaled, scale


class _ProjectionPass(Pass):
    """A pass that records the key and the value of one attention call, and returns zeros."""

    def __init__(self, stack: Stack, scaled: Scaled) -> None:
        super().__init__(stack)
        self.has_begun = True  # only a module runs, not the stack
        self.scaled = scaled
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the key and the value, [N, Hk, 1, D]."""
        query, self.key, self.value = args[1:4]
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], self.value.shape[3]), None

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Scale the output of the module's linear layers in the same way as for the text."""
        return scale(self.scaled, name, output)


def keys_and_values(site: Site, rows: Tensor, scaled: Scaled | None = None) -> tuple[Tensor, Tensor]:
    """Run rows through a site's own projections.

    Args:
        scaled: the prompt's factors and offsets of linear layers.

    Shape:
        rows [N, H] -> keys [N, Hk, Dk], values [N, Hk, Dv]
    """
    call, module, stack = site.call, site.module, site.stack
    assert call is not None
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    rows = rows if weight is None or weight.is_meta else rows.to(weight)
    args, kwargs = call.arguments(rows)
    forward_pass = _ProjectionPass(stack, scaled or {})
    with stack.state.running(forward_pass):
        module.forward(
            *args, **kwargs
        )  # `forward` skips hooks, because hooks that collect attentions would count this call
    assert forward_pass.key is not None
    assert forward_pass.value is not None
    return forward_pass.key.squeeze(2), forward_pass.value.squeeze(2)


def require_call(site: Site) -> AttentionCall:
    """Return the arguments for calling a site's attention module on rows.

    Raises:
        UnsupportedMethodError: the layer cannot be called on rows.
    """
    assert site.call is not None, "find_attention_calls comes first"
    if site.call.failure:
        raise UnsupportedMethodError(
            f"layer {site.index} cannot have a gated branch, because {site.call.failure}; a gated branch needs layers whose keys "
            "and values only depend on their input.",
            "Use another method, such as PrefixTuning, or leave out the lower layers with `num_layers`.",
            layer=f"{type(site.module).__name__}, number {site.index} of {site.stack.path or 'the model'}",
            because=site.call.failure,
        )
    return site.call

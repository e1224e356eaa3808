"""The encoder of LLaMA-Adapter: tables of rows and gates, and the context that is added to rows."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError
from softhooks.inject.branch.branch import CONTEXT
from softhooks.prompt_encoder import TableEncoder

PROMPTS, GATES, FACTORS, OFFSETS = "prompts", "gates", "factors", "offsets"
CONTEXT_WEIGHT, CONTEXT_BIAS = "context_weight", "context_bias"
"""The suffixes of the encoder's tables, after the name of the stack."""


class AdapterEncoder(TableEncoder):
    """The tables of LLaMA-Adapter: rows, gates, and with some options a linear layer, factors and offsets.

    Args:
        tables: by name; gates are [1, layers * Hq] or [1, layers].
        gate: `tanh` or `raw`, as in `LlamaAdapter`.
    """

    def __init__(self, tables: dict[str, Tensor], gate: str) -> None:
        super().__init__(tables)
        self.gate = gate

    def metrics(self) -> dict[str, float]:
        """Return how far the gates are open: the mean and the maximum of their absolute values."""
        gates = torch.cat([self(group)[0] for group in self.groups if group.endswith(GATES)]).detach()
        opening = (torch.tanh(gates) if self.gate == "tanh" else gates).abs()
        return {"gate": float(opening.mean()), "gate_max": float(opening.max())}


def check_context(context: Tensor, size: int, count: int | None) -> Tensor:
    """Check the shape of a context.

    Args:
        context: one vector for each row of the batch, [B, C], or K vectors, [B, K, C].
        size: C.
        count: K; None allows any number.

    Returns:
        [B, 1, C] or [B, K, C], in fp32.
    """
    vectors = context[:, None] if context.dim() == 2 else context
    allowed = vectors.dim() == 3 and vectors.shape[2] == size and (count is None or vectors.shape[1] in (1, count))
    if not allowed or not context.is_floating_point():
        found = f"{list(context.shape)}, {context.dtype}"
        raise UnsupportedModeError(
            f"`{CONTEXT}` is {found}; it must have one vector for each row of the batch, or one for each virtual token.",
            "Set `context_size` to the width of the vectors if it is not the model's.",
            prompt_context=found,
            expected=f"[B, {size}] or [B, {'any' if count is None else count}, {size}], floating-point",
        )
    return vectors.float()

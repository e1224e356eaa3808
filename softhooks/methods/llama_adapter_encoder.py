"""The encoder of LLaMA-Adapter, and the check of the context that is passed to the model."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError
from softhooks.inject.branch.branch import CONTEXT
from softhooks.prompt_encoder import TableEncoder

PROMPTS, GATES, FACTORS, OFFSETS = "prompts", "gates", "factors", "offsets"
CONTEXT_WEIGHT, CONTEXT_BIAS = "context_weight", "context_bias"
"""The endings of the parameters' names, after `text_`, `encoder_` or `decoder_`."""


class AdapterEncoder(TableEncoder):
    """The parameters of LLaMA-Adapter, and metrics of its gates; `LlamaAdapter` documents their names and shapes."""

    def __init__(self, tables: dict[str, Tensor], gate: str) -> None:
        super().__init__(tables)
        self.gate = gate

    def metrics(self) -> dict[str, float]:
        """Return the mean and the maximum of the gates' absolute values."""
        gates = torch.cat([self(group)[0] for group in self.groups if group.endswith(GATES)]).detach()
        opening = (torch.tanh(gates) if self.gate == "tanh" else gates).abs()
        return {"gate": float(opening.mean()), "gate_max": float(opening.max())}


def check_context(context: Tensor, size: int, count: int | None) -> Tensor:
    """Check a context, and convert it to fp32; if `count` is None, any K is allowed. [B, C] or [B, K, C] -> [B, 1 or K, C]."""
    vectors = context[:, None] if context.dim() == 2 else context
    allowed = vectors.dim() == 3 and vectors.shape[2] == size and (count is None or vectors.shape[1] in (1, count))
    if not allowed or not context.is_floating_point():
        found = f"{list(context.shape)}, {context.dtype}"
        raise UnsupportedModeError(
            f"`{CONTEXT}` is {found}; it must have one vector per row of the batch, or one per row and virtual token.",
            "If the vectors do not have the model's hidden size, set `context_size` to their size.",
            prompt_context=found,
            expected=f"[B, {size}] or [B, {'any' if count is None else count}, {size}], floating-point",
        )
    return vectors.float()

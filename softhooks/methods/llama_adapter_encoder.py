"""What LLaMA-Adapter trains: its rows, and the gates that they stand behind."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.encoder import TableEncoder

GATES = "gates"


class AdapterEncoder(TableEncoder):
    """Rows, gates and what else is trained, each a table of its own.

    Args:
        tables: by name; those of gates are [1, layers * Hq] or [1, layers].
        gate: what of g multiplies, `tanh` or `raw`.
    """

    def __init__(self, tables: dict[str, Tensor], gate: str) -> None:
        super().__init__(tables)
        self.gate = gate

    def metrics(self) -> dict[str, float]:
        """How far the gates are open: the mean of what multiplies, without its sign, and the largest."""
        gates = torch.cat([self(group)[0] for group in self.groups if group.endswith(GATES)]).detach()
        opening = (torch.tanh(gates) if self.gate == "tanh" else gates).abs()
        return {"gate": float(opening.mean()), "gate_max": float(opening.max())}

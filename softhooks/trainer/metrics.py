"""Metrics of a prompt that is being trained."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.prompt import SoftPrompt

PREFIX = "soft_prompt"
"""The metrics are logged as `soft_prompt/norm` and so on."""


class TrainingMetrics:
    """Computes a prompt's norm, the norm of its gradient, and its distance from its values when this object was created."""

    def __init__(self, prompt: SoftPrompt) -> None:
        self.prompt = prompt
        self._start = self._tables()
        self._gradients: list[Tensor] = []

    def store_gradients(self) -> None:
        """Store the clipped gradients of this step, because the Trainer clears them before it logs."""
        self._gradients = [p.grad for p in self.prompt.encoder.parameters() if p.grad is not None]

    def compute(self) -> dict[str, float]:
        """Compute `norm`, `distance`, `grad_norm` and the encoder's own metrics."""
        tables = self._tables()
        if not tables:  # sharded parameters need all processes, but only the first process logs
            return {}
        moved = [table - self._start[group].to(table) for group, table in tables.items() if group in self._start]
        norms = {"norm": _norm(list(tables.values())), "distance": _norm(moved)}
        if self._gradients:
            norms["grad_norm"] = _norm(self._gradients)
        values = torch.stack(list(norms.values())).tolist()  # a single transfer from the device
        found = dict(zip(norms, values, strict=True)) | self.prompt.encoder.metrics()
        return {f"{PREFIX}/{name}": float(value) for name, value in found.items()}

    def _tables(self) -> dict[str, Tensor]:
        encoder = self.prompt.encoder
        if any(hasattr(parameter, "full_tensor") for parameter in encoder.parameters()):
            return {}
        return encoder.folded()


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor.detach().float()) for tensor in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm

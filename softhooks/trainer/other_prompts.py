"""Freezing of a model's other prompts while one prompt trains."""

from __future__ import annotations

from torch import nn

from softhooks.base_model.gradients import StashedGradients
from softhooks.prompt import SoftPrompt


class FrozenPrompts:
    """The parameters of prompts that are frozen while another prompt of the same model trains."""

    def __init__(self) -> None:
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._gradients = StashedGradients()

    def freeze_all_but(self, prompt: SoftPrompt) -> None:
        """Make one prompt of its model trainable, and freeze the other prompts; their gradients are kept for `unfreeze`."""
        for other in prompt.prompted_model.prompts.values():
            for part in (other.encoder, other.heads):
                for name, parameter in part.named_parameters(f"{other.name}.{type(part).__name__}"):
                    if other is not prompt and parameter.requires_grad:
                        self._frozen.append((name, parameter))
                    parameter.requires_grad_(other is prompt)
        self._gradients.take(self._frozen)

    def unfreeze(self) -> None:
        """Make the other prompts trainable again, and restore the gradients they had."""
        for _, parameter in self._frozen:
            parameter.requires_grad_(True)
        self._gradients.restore(self._frozen)
        self._frozen.clear()

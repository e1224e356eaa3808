"""Residual prompt tuning: a small MLP is trained with the prompt, and its output is added to the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.stack import ModelStructure
from softhooks.errors import MAX_WIDTH, check_dropout, check_int
from softhooks.methods.prompt_tuning import PromptTuning
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder


class ResidualEncoder(PromptEncoder):
    """Computes `P' = P + MLP(P)`. The MLP's last layer is initialized with zeros, so P' is initially P."""

    groups = (EMBEDDINGS,)

    def __init__(self, rows: Tensor, hidden_size: int, layer_norm: bool, dropout: float) -> None:
        super().__init__()
        width = rows.shape[1]
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.down = nn.Linear(width, hidden_size)
        self.up = nn.Linear(hidden_size, width)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.dropout = dropout
        for parameter in (self.norm if layer_norm else self.up).parameters():
            nn.init.zeros_(parameter)

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute the prompt, [P, H]."""
        hidden = self.up(functional.relu(self.down(self.rows)))
        added: Tensor = self.norm(functional.dropout(hidden, self.dropout, self.training))
        return self.rows + added


@dataclass(frozen=True)
class ResidualPromptTuning(PromptTuning):
    """Residual prompt tuning: `P' = P + MLP(P)`, [P, H], where P and the MLP are trained; only P' is saved.

    All virtual tokens share the MLP (Linear-ReLU-Linear-LayerNorm), so the result depends less on the initialization and the
    learning rate. Start with the learning rates of `PromptTuning`.

    The scale and offset of the LayerNorm, or the last linear layer if there is no LayerNorm, are initialized with zeros, so P' is
    initially P. In the first step only P and these parameters get a gradient.

    Source: Razdaibiedina et al. 2023, arXiv:2305.03937, the variant with a shared MLP. Differences: the authors initialize the
    LayerNorm's scale with 1, but in models with small embeddings, the MLP's output would then outweigh a P made of word
    embeddings.

    Args:
        num_virtual_tokens, init, init_text, init_labels, init_tensor, init_from, tokenizer, whole_vocabulary, placement: as in
            `PromptTuning`.
        hidden_size: the width of the MLP.
        layer_norm: end the MLP with a LayerNorm.
        dropout: the dropout probability of the MLP's output, before the LayerNorm.

    Raises:
        OptionError: an option is wrong, or missing for the chosen `init`.
    """

    kind: ClassVar[str] = "residual_prompt_tuning"

    hidden_size: int = field(default=400, kw_only=True)
    layer_norm: bool = field(default=True, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("hidden_size", self.hidden_size, maximum=MAX_WIDTH)
        check_dropout("dropout", self.dropout)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with the initial embeddings and the MLP."""
        rows, ids = self.initial_rows(structure)
        encoder = self._encoder(rows)
        encoder.start_ids = ids
        return encoder

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Add a new MLP to a folded prompt; the MLP's output is initially zero."""
        return self._encoder(tables[EMBEDDINGS])

    def _encoder(self, rows: Tensor) -> ResidualEncoder:
        return ResidualEncoder(rows, self.hidden_size, self.layer_norm, self.dropout)

"""Residual prompt tuning: the rows of a prompt, and what one small MLP adds to each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from softhooks.encoder import EMBEDDINGS, PromptEncoder
from softhooks.errors import OptionError
from softhooks.methods.prompt_tuning import PromptTuning

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure


class ResidualEncoder(PromptEncoder):
    """`P' = P + MLP(P)`, one MLP for all rows: down, ReLU, up, LayerNorm. Its last layer starts at zero, so that P' starts as P.

    Args:
        rows: P, [P, H].
        hidden_size: m, of the MLP.
        layer_norm: end the MLP in a LayerNorm.
        dropout: on the MLP's output, before the LayerNorm.
    """

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
    """Residual prompt tuning: `P' = P + MLP(P)` takes the place of P; only its result is saved.

    The MLP lets rows learn from each other's gradients, which makes the result depend less on the start and the learning rate.
    Start from the learning rates of `PromptTuning`.

    The MLP's last layer (the LayerNorm's scale and offset, or without it the up-projection) starts at zero: the first prompt is
    what `init` says, bit for bit, and a saved prompt goes on training from where it was. In the first step only that layer has a
    gradient beside the rows.

    Source: Razdaibiedina et al. 2023, arXiv:2305.03937, the MLP that all rows share. Differs: the authors start the LayerNorm at
    a scale of 1, which adds noise of size 1 to each number of the first prompt; that hides a start from words in models whose
    embeddings are small.

    Args:
        num_virtual_tokens, init, init_text, init_labels, init_tensor, tokenizer, whole_vocabulary, placement: as in
            `PromptTuning`.
        hidden_size: m, of the MLP.
        layer_norm: end the MLP in a LayerNorm.
        dropout: on the MLP's output, before the LayerNorm.

    Shape:
        the encoder returns [P, H].

    Raises:
        OptionError: an option is wrong, or missing for the chosen `init`.
    """

    kind: ClassVar[str] = "residual_prompt_tuning"

    hidden_size: int = field(default=400, kw_only=True)
    layer_norm: bool = field(default=True, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options against each other."""
        super().__post_init__()
        if not isinstance(self.hidden_size, int) or self.hidden_size < 1:
            raise OptionError(f"hidden_size must be a whole number of 1 or more; it is {self.hidden_size!r}.")
        if not 0.0 <= self.dropout < 1.0:
            raise OptionError(f"dropout must be at least 0 and below 1; it is {self.dropout}.")

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the rows, initialized, and the MLP."""
        rows, words = self.start(structure)
        encoder = self._encoder(rows)
        encoder.start_ids = words
        return encoder

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Put a new MLP, which adds nothing yet, on a folded prompt."""
        return self._encoder(tables[EMBEDDINGS])

    def _encoder(self, rows: Tensor) -> ResidualEncoder:
        return ResidualEncoder(rows, self.hidden_size, self.layer_norm, self.dropout)

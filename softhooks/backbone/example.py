"""The arguments of probe forwards: token ids, and what else a model needs besides them, from an example batch."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TEXT_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""The arguments for the text of a batch; a probe forward passes a text of its own instead."""
LABELS = ("labels", "start_positions", "end_positions", "return_loss", "return_dict")
"""Arguments that say what a forward returns."""


@dataclass(frozen=True, eq=False)
class Example:
    """How to make the arguments of a probe forward from token ids.

    Attributes:
        is_encoder_decoder: whether the model takes `decoder_input_ids`.
        choices: the number of choices per row of a multiple-choice model ([B, C, T]); otherwise None.
        others: the arguments besides the text, with one row each, by name; empty if the model runs on ids alone.
        columns: the number of tokens of the text that `others` were made for.
        has_mask: whether every forward gets an attention mask.
        has_text: whether the model takes `input_ids`; if False, it gets `others`, with as many rows as there are texts.
    """

    is_encoder_decoder: bool = False
    choices: int | None = None
    others: dict[str, Any] = field(default_factory=dict)
    columns: int = 0
    has_mask: bool = False
    has_text: bool = True

    def arguments(self, ids: Tensor, mask: Tensor | None = None, decoder: Tensor | None = None) -> dict[str, Any]:
        """Return the arguments of a forward on token ids.

        Args:
            ids: the text, [B, T].
            mask: its attention mask, [B, T]; None for no mask, or a mask of ones if `has_mask` is True.
            decoder: the decoder's ids, [B, T]; by default the ids of the text in a different order.
        """
        others = {name: self._fitted(value, *ids.shape) for name, value in self.others.items()}
        arguments: dict[str, Any] = {}
        if self.has_text:
            arguments["input_ids"] = self._for_choices(ids)
            if mask is None and self.has_mask:
                mask = torch.ones_like(ids)
            if mask is not None:
                arguments["attention_mask"] = self._for_choices(mask)
        if self.is_encoder_decoder:
            # The same number of ids, which some heads require.
            arguments["decoder_input_ids"] = ids.roll(1, dims=-1) if decoder is None else decoder
        return arguments | others

    def _for_choices(self, rows: Tensor) -> Tensor:
        """Repeat each row as several choices if the model needs it. [B, T] -> [B, C, T]."""
        return rows if self.choices is None else rows.unsqueeze(1).expand(-1, self.choices, -1).contiguous()

    def _fitted(self, value: Any, batch: int, columns: int) -> Any:
        """Give an argument as many rows and, if it has a value for each token, as many columns as a text has."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        # Values for tokens are integers, such as boxes; a dimension of pixels or sound may have the length of the text by chance.
        if value.dim() > 1 and value.shape[1] == self.columns and not value.is_floating_point():
            index = torch.arange(columns, device=value.device).clamp(max=self.columns - 1)
            value = value.index_select(1, index)
        return value.repeat(batch, *[1] * (value.dim() - 1))


def without_columns(
    batch: Mapping[str, Any] | None, model: nn.Module, columns: Collection[str]
) -> Mapping[str, Any] | None:
    """Return a batch without a prompt's columns, which the model without the prompt does not take."""
    if batch is None or not columns:
        return batch
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name not in columns or name in taken}


def example_of(batch: Mapping[str, Any], device: torch.device) -> Example:
    """Make an example from the first row of a batch: all its arguments except the text and the labels."""
    text = next((batch[name] for name in TEXT_ARGUMENTS if isinstance(batch.get(name), Tensor)), None)
    rows = 1 if text is None else text.shape[0]
    others = {
        name: value[:1].to(device) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for name, value in batch.items()
        if name not in (*TEXT_ARGUMENTS, *LABELS) and not name.startswith("decoder_") and value is not None
    }
    has_mask = batch.get("attention_mask") is not None
    return Example(others=others, columns=0 if text is None else text.shape[1], has_mask=has_mask)

"""The objective of context-aware prompt tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefill import logits_of
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.objectives.base import Finish, Objective, PromptOnModel, with_loss
from softhooks.objectives.losses import Texts, require_logits


class WeightedLabels(Objective):
    """Cross-entropy on the label tokens of the prompt, with weights, and on the label tokens of the text, with weight 1.

    The label tokens of the prompt are the virtual tokens that were initialized from the labels of its examples. The loss of a
    sequence is the weighted sum over the label tokens of the prompt and the text, except those hidden from its row, divided by
    their number.

    The loss of a batch is `sum_b n_b loss_b / N`, where n_b is the number of label tokens in the text of sequence b, and N is
    `num_items_in_batch` if a Trainer passes it, otherwise the sum of all n_b. With `num_items_in_batch`, the gradients do not
    depend on how a batch is split into micro-batches and processes. Each document in a packed row is a separate sequence.

    Args:
        places: the indices of the label tokens among the prompt's virtual tokens; never 0.
        targets: the ids of these tokens.
        weights: the weights of these tokens.
    """

    def __init__(self, places: Sequence[int], targets: Sequence[int], weights: Sequence[float]) -> None:
        self.places = torch.tensor(places)
        self.targets = torch.tensor(targets)
        self.weights = torch.tensor(weights)

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish:
        """Remove the labels from the call, so that the model does not compute its own loss."""
        labels, shifted = call.pop("labels"), call.pop("shift_labels", None)
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted is None else shifted
        items = call.pop("num_items_in_batch", None)
        texts = Texts.of(call, targets)

        def finish(output: Any) -> Any:
            sums, counts = _label_sums(output[0], targets, texts)
            prompt_losses = self._prompt_losses(prompt).to(sums)
            visible = self._visible(prompt, given, len(targets)).to(sums)
            visible = visible.repeat_interleave(texts.per_row, dim=0)
            losses = (visible @ prompt_losses + sums) / (visible.sum(-1) + counts).clamp(min=1)
            total = counts.sum().clamp(min=1) if items is None else torch.as_tensor(items).to(sums)
            return with_loss(output, (counts * losses).sum() / total, has_loss=False)

        return finish

    def _prompt_losses(self, prompt: PromptOnModel) -> Tensor:
        """Compute the weighted loss of each label token of the prompt, in fp32, [labels]."""
        states = prompt.states
        if states is None:
            raise UnsupportedModeError(
                "this call computes the prompt separately for each row, but the loss on the prompt's labels needs a prompt that "
                "is computed once for all rows.",
                "Leave out inputs other than the text, such as `token_type_ids` or encoder states.",
                prompt=prompt.name,
            )
        chosen = states[:, (self.places - 1).to(states.device)]  # the state before a token predicts it
        logits = logits_of(prompt.model, prompt.structure.entry, chosen, prompt.placeholder_id)[0].float()
        losses = functional.cross_entropy(logits, self.targets.to(logits.device), reduction="none")
        return losses * self.weights.to(logits.device)

    def _visible(self, prompt: PromptOnModel, given: dict[str, Tensor], batch: int) -> Tensor:
        """Return whether each row attends to each label token of the prompt, [B, labels] bool."""
        hidden = prompt.encoder.hidden_tokens(given, batch)
        if hidden is None:
            return torch.ones(batch, len(self.places), dtype=torch.bool)
        return ~hidden[:, self.places.to(hidden.device)].expand(batch, -1)


def _label_sums(logits: Tensor, targets: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of each sequence's label tokens, and count them. [B, T, V], [B, T] -> [sequences], [sequences]."""
    require_logits(logits, *targets.shape)
    targets = targets.to(logits.device)
    is_label = targets != IGNORE_INDEX
    losses = functional.cross_entropy(logits[is_label].float(), targets[is_label], reduction="none")
    return texts.sums(losses.new_zeros(targets.shape).masked_scatter(is_label, losses)), texts.sums(is_label.long())

"""Objectives: what a prompt is trained on beside, or in the place of, the model's own loss.

An objective joins each training forward that brings labels. It may change the call before the model sees it, and the output
after; so a Trainer, and any loop that reads `output.loss`, trains on it with not a line changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.stack import ModelStructure, Role, Stack
from softhooks.encoder import PromptEncoder
from softhooks.errors import UnsupportedModeError
from softhooks.inject.prefill import logits_of
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.inject.prefix.packed import documents

IGNORED = -100
"""The label of a token that is not to be predicted."""

Finish = Callable[[Any], Any]
"""What an objective makes of the model's output."""


class PromptOnModel(Protocol):
    """A prompt that is attached to a model, as objectives and methods see it."""

    @property
    def name(self) -> str:
        """The name under which it is attached."""

    @property
    def model(self) -> nn.Module:
        """The model, as the user gave it."""

    @property
    def structure(self) -> ModelStructure:
        """The model's stacks, embeddings and attention layers."""

    @property
    def encoder(self) -> PromptEncoder:
        """The module that computes the prompt."""

    @property
    def injection(self) -> str:
        """How the prompt enters the model; see `SoftPrompt`."""

    @property
    def conventions(self) -> Mapping[str, Any]:
        """What the prompt assumes about the forward pass: shifted positions, sliding windows, placement."""

    @property
    def placeholder_id(self) -> int:
        """An ordinary id of the vocabulary, for calls in which only the number of ids matters."""

    @property
    def states(self) -> Tensor | None:
        """The virtual tokens' last hidden states in the current forward, [R, P, H]; None if the prompt was not run alone."""

    def without_objective(self) -> AbstractContextManager[Any]:
        """Run the model inside the context without this prompt's objective."""

    def standing_in(self, key_values: Callable[[Stack], dict[Role, KeyValues]]) -> AbstractContextManager[None]:
        """Use other keys and values, of any length, in place of the prompt's inside the context."""


class Objective(ABC):
    """What a method trains on. A method returns one from `Method.objective`."""

    def check(self, prompt: PromptOnModel) -> None:  # noqa: B027 - most objectives suit every model
        """Refuse a model that cannot be trained so, when a prompt is attached to be trained."""

    @abstractmethod
    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish | None:
        """Join one training forward.

        Args:
            prompt: the prompt that trains.
            call: the arguments of the model's forward by name, `labels` among them; may be changed in place.
            given: the extra arguments that the method takes.

        Returns:
            what to make of the output; None leaves it alone.
        """


def with_loss(output: Any, loss: Tensor, has_loss: bool) -> Any:
    """Put a loss into a model's output.

    Args:
        has_loss: whether the output has one, which is replaced.
    """
    if isinstance(output, tuple):
        return (loss, *output[1:]) if has_loss else (loss, *output)
    output["loss"] = loss
    if not has_loss:
        output.move_to_end("loss", last=False)  # outputs are read by position too, and there the loss comes first
    return output


def kl_divergence(teacher: Tensor, student: Tensor, top_k: int | None = None) -> Tensor:
    """KL(teacher || student) of each pair of distributions, in fp32.

    Args:
        teacher, student: logits.
        top_k: tell only the teacher's k likeliest tokens apart, and take all others as one; None: every token.

    Shape:
        [..., V], [..., V] -> [...]; exactly 0 where the logits are equal, and at most the full KL with `top_k`.
    """
    wanted, found = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if top_k is not None and top_k < wanted.shape[-1]:
        chosen = wanted.topk(top_k, dim=-1).indices
        wanted, found = _with_rest(wanted, chosen), _with_rest(found, chosen)
    return (wanted.exp() * (wanted - found)).sum(-1)


def _with_rest(logs: Tensor, chosen: Tensor) -> Tensor:
    """Keep some log-probabilities, and put that of all others together behind them. [..., V], [..., k] -> [..., k + 1]."""
    rest = logs.scatter(-1, chosen, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, chosen), rest], dim=-1)


class WeightedLabels(Objective):
    """Cross-entropy on label tokens of the prompt itself, weighted, and on those of the text.

    A row's loss is the mean over both; a label token of the prompt that the row does not see counts for neither sum nor number.
    Rows are weighted by the label tokens of their text: `sum_b n_b loss_b / N`, with N the `num_items_in_batch` of the call,
    where a Trainer gives it, and else the sum of n_b. So any split into micro-batches and processes equals one batch, where N is
    told. Of documents packed into one row each counts as a row. The prompt's logits are computed once, at its labels only; in
    fp32 from the logits on.

    Args:
        places: where the prompt's label tokens stand, none of them first.
        targets: their ids.
        weights: their weights; the text's labels have 1.
    """

    def __init__(self, places: Sequence[int], targets: Sequence[int], weights: Sequence[float]) -> None:
        self.places = torch.tensor(places)
        self.targets = torch.tensor(targets)
        self.weights = torch.tensor(weights)

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish:
        """Take the labels out of the call, so that the model does not compute a loss too."""
        labels, shifted = call.pop("labels"), call.pop("shift_labels", None)
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted is None else shifted
        items = call.pop("num_items_in_batch", None)
        texts = Texts.of(call, targets)

        def finish(output: Any) -> Any:
            sums, counts = _label_sums(output[0], targets, texts)
            own = self._own_losses(prompt).to(sums)
            seen = self._seen(prompt, given, len(targets)).to(sums)
            seen = seen.repeat_interleave(texts.per_row, dim=0)
            losses = (seen @ own + sums) / (seen.sum(-1) + counts).clamp(min=1)
            total = counts.sum().clamp(min=1) if items is None else torch.as_tensor(items).to(sums)
            return with_loss(output, (counts * losses).sum() / total, has_loss=False)

        return finish

    def _own_losses(self, prompt: PromptOnModel) -> Tensor:
        """The weighted loss of each of the prompt's label tokens; the state before it predicts it."""
        states = prompt.states
        if states is None:
            raise UnsupportedModeError(
                "an objective over the prompt's own tokens needs a call in which the prompt is computed once.",
                "Leave out what the call brings beside the text, such as `token_type_ids` or an encoder's states.",
                prompt=prompt.name,
            )
        chosen = states[:, (self.places - 1).to(states.device)]
        logits = logits_of(prompt.model, prompt.structure.entry, chosen, prompt.placeholder_id)[0].float()
        losses = functional.cross_entropy(logits, self.targets.to(logits.device), reduction="none")
        return losses * self.weights.to(logits.device)

    def _seen(self, prompt: PromptOnModel, given: dict[str, Tensor], batch: int) -> Tensor:
        """Which of the prompt's label tokens count for each row, [B, labels] bool."""
        hidden = prompt.encoder.hidden(given, batch)
        if hidden is None:
            return torch.ones(batch, len(self.places), dtype=torch.bool)
        return ~hidden[:, self.places.to(hidden.device)].expand(batch, -1)


@dataclass(frozen=True)
class Texts:
    """What a batch holds: a text in each row, or several documents packed into one.

    Attributes:
        columns: which of its row's texts each column belongs to, [B, T].
        per_row: how many texts a row has; some may be empty.
    """

    columns: Tensor
    per_row: int

    @classmethod
    def of(cls, call: dict[str, Any], like: Tensor) -> Texts:
        """Read a call's positions, which start again with each document.

        Args:
            like: a tensor of the batch's rows and columns, [B, T].
        """
        found = documents(call.get("position_ids"), call.get("attention_mask"), like.shape[1])
        if found is None:
            return cls(torch.zeros_like(like, dtype=torch.long), 1)
        return cls(found.to(like.device).expand(like.shape), int(found.max()) + 1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum what the columns of each text have, in an order that is always the same. [B, T] -> [B * per_row]."""
        if self.per_row == 1:
            return values.sum(-1)
        own = functional.one_hot(self.columns.to(values.device), self.per_row).bool()
        return values[..., None].masked_fill(~own, 0).sum(1).flatten()


def _label_sums(logits: Tensor, targets: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of each text's label tokens, and count them. [B, T, V], [B, T] -> [texts], [texts]."""
    if logits.shape[:2] != targets.shape:
        raise UnsupportedModeError(
            "a loss over labels needs a logit for each of them.",
            "Leave `logits_to_keep` out in training.",
            logits=list(logits.shape[:2]),
            labels=list(targets.shape),
        )
    targets = targets.to(logits.device)
    is_label = targets != IGNORED
    losses = functional.cross_entropy(logits[is_label].float(), targets[is_label], reduction="none")
    return texts.sums(losses.new_zeros(targets.shape).masked_scatter(is_label, losses)), texts.sums(is_label.long())

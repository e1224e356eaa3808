"""Distillation from another prompt on the same frozen model.

The model runs twice in each step: as the teacher, in evaluation mode and without gradients, and as the student. There is no
second model in memory. Logits are compared where there is a label, hidden states at every text token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.heads import is_causal_lm
from softhooks.backbone.probing import eval_mode
from softhooks.compat.sharding import gather_root
from softhooks.errors import UnsupportedModeError
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.objectives.base import Finish, Objective, PromptOnModel, with_loss
from softhooks.objectives.losses import Texts, kl_divergence

Teacher = Callable[[PromptOnModel], AbstractContextManager[None] | None]
"""Returns a context in which the model runs with the teacher's prompt; None if there is no teacher in this step."""


class Distillation(Objective):
    """Train on `L + weight * (KL(teacher || student) + MSE(hidden states))`.

    Logits are compared where there is a label, because these are the distributions that the model's own loss trains. The hidden
    states are the last ones, of every text token that the attention mask shows; in an encoder-decoder half of the weight goes to
    the encoder's text and half to the labeled decoder tokens.

    Both terms are sums over labels, divided by the number of labels that the model's loss is divided by; the hidden states of a
    text have the weight of its labels. So accumulated gradients equal those of one large batch. Each document of a packed row
    counts as a text.

    Args:
        weight: lambda.
        teacher: switches the model to the teacher's prompt.
    """

    def __init__(self, weight: float, teacher: Teacher) -> None:
        self.weight = weight
        self.teacher = teacher

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish | None:
        """Run the teacher, and ask the student's forward for its hidden states."""
        context = self.teacher(prompt)
        if context is None:
            return None
        comparison = Comparison.of(prompt, call)
        requested = _RequestedOutput.of(prompt.model, call)
        with torch.no_grad(), eval_mode(prompt.model), prompt.without_objective(), context:
            target = comparison.read(prompt.model(**call, **given))
        gather_root(prompt.model)  # under FSDP the teacher's forward has sharded the root again

        def finish(output: Any) -> Any:
            divergence, distance = comparison.compare(target, comparison.read(output))
            loss = output["loss"] + self.weight * (divergence + distance)
            return requested.restore(with_loss(output, loss, has_loss=True))

        return finish


@dataclass(frozen=True)
class Comparison:
    """The positions of a batch at which teacher and student are compared, and their weights.

    Attributes:
        labeled: which logits have a label, [B, T] bool, or [B] for a classifier of rows.
        text: which columns are text, [B, T] bool.
        texts: which text each column belongs to.
        share: the share of the labels that each text has, [B], or more where documents are packed.
        count: the number of labels that the loss is divided by.
        two_stacks: whether the model is an encoder-decoder.
    """

    labeled: Tensor
    text: Tensor
    texts: Texts
    share: Tensor
    count: Tensor
    two_stacks: bool

    @classmethod
    def of(cls, prompt: PromptOnModel, call: dict[str, Any]) -> Comparison:
        """Read the masks and labels of a call."""
        _check(call)
        labels = call["labels"]
        given = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        assert given is not None
        mask = call.get("attention_mask")
        text = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask is None else mask.bool()
        labeled = _labeled(prompt, call)
        two_stacks = prompt.structure.is_encoder_decoder
        has_text_labels = labeled.shape == text.shape and not two_stacks  # one label for each text column
        texts = Texts.of(call if has_text_labels else {}, text)
        sums = texts.sums(labeled.long()) if has_text_labels else labeled.long().reshape(len(labeled), -1).sum(-1)
        count = call.get("num_items_in_batch")
        count = torch.as_tensor(sums.sum() if count is None else count, device=labels.device).clamp(min=1)
        return cls(labeled, text, texts, sums / count, count, two_stacks)

    def read(self, output: Any) -> tuple[Tensor, list[Tensor]]:
        """Take the labeled logits, [N, V], and the last hidden states of each stack, [B, T, H], from an output."""
        logits = output.logits
        if logits.shape[:-1] != self.labeled.shape or logits.shape[-1] < 2:
            raise UnsupportedModeError(
                f"the logits {list(logits.shape)} are not one distribution over classes for each label; distillation compares "
                "such distributions.",
                "Train this head without teachers.",
                logits=list(logits.shape),
                labels=list(self.labeled.shape),
            )
        if not self.two_stacks:
            return logits[self.labeled], [output.hidden_states[-1]]
        states = [output.encoder_last_hidden_state]
        if self.labeled.dim() > 1:
            states.append(output.decoder_hidden_states[-1])
        return logits[self.labeled], states

    def compare(
        self, teacher: tuple[Tensor, list[Tensor]], student: tuple[Tensor, list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Compute the KL divergence of the logits and the MSE of the states; both are exactly 0 for equal outputs."""
        divergence = kl_divergence(teacher[0], student[0]).sum() / self.count
        columns = [self.text, self.labeled]
        distances = [
            (mean_square(*states, columns[stack], self.texts) * self.share).sum()
            for stack, states in enumerate(zip(teacher[1], student[1], strict=True))
        ]
        return divergence, torch.stack(distances).mean()


def mean_square(teacher: Tensor, student: Tensor, visible: Tensor, texts: Texts) -> Tensor:
    """Compute each text's mean squared difference over its visible columns, in fp32. [B, T, H], [B, T] -> [texts]."""
    squares = (teacher.float() - student.float()).square().mean(-1).masked_fill(~visible, 0.0)
    return texts.sums(squares) / texts.sums(visible.long()).clamp(min=1)


def _labeled(prompt: PromptOnModel, call: dict[str, Any]) -> Tensor:
    """Return which logits the model's own loss compares with a label."""
    if call.get("shift_labels") is not None:
        return torch.as_tensor(call["shift_labels"] != IGNORE_INDEX)
    labeled: Tensor = call["labels"] != IGNORE_INDEX
    if is_causal_lm(prompt.model, prompt.structure):
        # The logits of a column predict the label of the next one.
        labeled = torch.cat([labeled[:, 1:], torch.zeros_like(labeled[:, :1])], 1)
    return labeled


def _check(call: dict[str, Any]) -> None:
    mask, labels = call.get("attention_mask"), call["labels"]
    computed = [name for name in ("past_key_values", "encoder_outputs") if call.get(name) is not None]
    if computed:
        raise UnsupportedModeError(
            f"the call has {' and '.join(computed)}; teacher and student must both read the whole text.",
            f"Leave out {' and '.join(computed)}.",
            given=", ".join(computed),
        )
    if (mask is not None and mask.dim() != 2) or labels.is_floating_point():
        raise UnsupportedModeError(
            "the call has an attention mask that is not [B, T], or labels that are not whole numbers; distillation needs both.",
            "Pass a mask with one number for each token, and labels that are whole numbers.",
            attention_mask="none" if mask is None else list(mask.shape),
            labels=f"{list(labels.shape)} {labels.dtype}",
        )


@dataclass(frozen=True)
class _RequestedOutput:
    """The form of output that the caller asked for; the objective itself needs a `ModelOutput` with hidden states."""

    hidden_states: bool
    named: bool

    @classmethod
    def of(cls, model: Any, call: dict[str, Any]) -> _RequestedOutput:
        """Note what the call asks for, and change it to ask for a `ModelOutput` with hidden states."""
        hidden, named = call.get("output_hidden_states"), call.get("return_dict")
        hidden = getattr(model.config, "output_hidden_states", False) if hidden is None else hidden
        named = getattr(model.config, "return_dict", True) if named is None else named
        call["output_hidden_states"] = True
        if not named:
            call["return_dict"] = True
        return cls(bool(hidden), bool(named))

    def restore(self, output: Any) -> Any:
        """Remove the outputs that the caller did not request."""
        if not self.hidden_states:
            kept = {key: value for key, value in output.items() if not key.endswith("hidden_states")}
            output = type(output)(**kept)
        return output if self.named else output.to_tuple()

"""Distillation from another prompt on the same frozen model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.heads import is_causal_lm
from softhooks.backbone.probing import eval_mode
from softhooks.compat.cache_argument import NAMES
from softhooks.compat.sharding import gather_root
from softhooks.errors import UnsupportedModeError
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.objectives.base import Finish, Objective, PromptOnModel, with_loss
from softhooks.objectives.losses import Texts, kl_divergence

Teacher = Callable[[PromptOnModel], AbstractContextManager[None] | None]
"""Returns a context manager in which the model uses the teacher's prompt, or None if the step has no teacher."""


class Distillation(Objective):
    """Train on `L + weight * (KL(teacher || student) + MSE(hidden states))`, where L is the model's own loss.

    Each step runs the model twice: first with the teacher's prompt, in evaluation mode and without gradients, then with the
    student's prompt.

    Logits are compared at labeled tokens. The last hidden states are compared at all text tokens that are not masked. In an
    encoder-decoder with labeled tokens, the encoder's text and the decoder's labeled tokens each contribute half of the MSE.

    Both terms are divided by the same number of labels as the model's own loss, and each sequence is weighted by its number of
    labels. Accumulated gradients are therefore equal to those of one large batch. Each document in a packed row is a separate
    sequence.

    Args:
        weight: the weight of the sum of both terms.
        teacher: a function that returns a context manager in which the model uses the teacher's prompt, or None if the step has
            no teacher.
    """

    def __init__(self, weight: float, teacher: Teacher) -> None:
        self.weight = weight
        self.teacher = teacher

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish | None:
        """Run the teacher, and request hidden states from the student's forward."""
        context = self.teacher(prompt)
        if context is None:
            return None
        comparison = Comparison.of(prompt, call)
        restore = _request_hidden_states(prompt.model, call)
        with torch.no_grad(), eval_mode(prompt.model), prompt.without_objective(), context:
            target = comparison.read(prompt.model(**call, **given))
        gather_root(prompt.model)  # under FSDP the teacher's forward has sharded the root again

        def finish(output: Any) -> Any:
            divergence, distance = comparison.compare(target, comparison.read(output))
            loss = output["loss"] + self.weight * (divergence + distance)
            return restore(with_loss(output, loss, has_loss=True))

        return finish


@dataclass(frozen=True)
class Comparison:
    """The tokens of a batch at which teacher and student are compared, and their weights.

    Attributes:
        labeled: True where the logits have a label, [B, T], or [B] for a sequence classifier.
        text: True for tokens that are not padding, [B, T].
        texts: the sequence that each token belongs to; see `Texts`.
        share: the number of labels in each sequence, divided by `count`, [sequences].
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
        """Create the comparison for a forward with these arguments."""
        _check(call)
        labels = call["labels"]
        given = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        assert given is not None
        mask = call.get("attention_mask")
        text = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask is None else mask.bool()
        labeled = _labeled(prompt, call)
        two_stacks = prompt.structure.is_encoder_decoder
        has_text_labels = labeled.shape == text.shape and not two_stacks  # one label for each token
        texts = Texts.of(call if has_text_labels else {}, text)
        sums = texts.sums(labeled.long()) if has_text_labels else labeled.long().reshape(len(labeled), -1).sum(-1)
        count = call.get("num_items_in_batch")
        count = torch.as_tensor(sums.sum() if count is None else count, device=labels.device).clamp(min=1)
        return cls(labeled, text, texts, sums / count, count, two_stacks)

    def read(self, output: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the labeled logits, [N, V], and the last hidden states, [B, T, H], of the encoder, the decoder or both."""
        logits = output.logits
        if logits.shape[:-1] != self.labeled.shape or logits.shape[-1] < 2:
            raise UnsupportedModeError(
                f"the logits have the shape {list(logits.shape)}; distillation needs at least two logits for each label.",
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
        """Return the KL divergence of the logits and the MSE of the hidden states; both are exactly 0 for equal outputs."""
        divergence = kl_divergence(teacher[0], student[0]).sum() / self.count
        columns = [self.text, self.labeled]
        distances = [
            (mean_square(*states, columns[stack], self.texts) * self.share).sum()
            for stack, states in enumerate(zip(teacher[1], student[1], strict=True))
        ]
        return divergence, torch.stack(distances).mean()


def mean_square(teacher: Tensor, student: Tensor, visible: Tensor, texts: Texts) -> Tensor:
    """Compute the mean squared difference over each sequence's visible tokens, in fp32. [B, T, H], [B, T] -> [sequences]."""
    squares = (teacher.float() - student.float()).square().mean(-1).masked_fill(~visible, 0.0)
    return texts.sums(squares) / texts.sums(visible.long()).clamp(min=1)


def _labeled(prompt: PromptOnModel, call: dict[str, Any]) -> Tensor:
    """Return a mask of the logits that the model's own loss compares with a label, [B, T] or [B]."""
    if call.get("shift_labels") is not None:
        return torch.as_tensor(call["shift_labels"] != IGNORE_INDEX)
    labeled: Tensor = call["labels"] != IGNORE_INDEX
    if is_causal_lm(prompt.model, prompt.structure):
        # The logits at a token predict the label of the next one.
        labeled = torch.cat([labeled[:, 1:], torch.zeros_like(labeled[:, :1])], 1)
    return labeled


def _check(call: dict[str, Any]) -> None:
    mask, labels = call.get("attention_mask"), call["labels"]
    computed = [name for name in (*NAMES, "encoder_outputs") if call.get(name) is not None]
    if computed:
        raise UnsupportedModeError(
            f"the call has {' and '.join(computed)}; teacher and student must both read the whole text.",
            f"Leave out {' and '.join(computed)}.",
        )
    if (mask is not None and mask.dim() != 2) or labels.is_floating_point():
        raise UnsupportedModeError(
            "the attention mask or the labels are not supported; the mask must be [B, T], and the labels must be whole numbers.",
            "Pass a mask with one number for each token, and class or token ids as labels.",
            attention_mask="none" if mask is None else list(mask.shape),
            labels=f"{list(labels.shape)} {labels.dtype}",
        )


def _request_hidden_states(model: Any, call: dict[str, Any]) -> Callable[[Any], Any]:
    """Request a `ModelOutput` with hidden states; return a function that converts it to the output that the caller requested."""
    hidden, named = call.get("output_hidden_states"), call.get("return_dict")
    hidden = getattr(model.config, "output_hidden_states", False) if hidden is None else hidden
    named = getattr(model.config, "return_dict", True) if named is None else named
    call["output_hidden_states"] = True
    if not named:
        call["return_dict"] = True

    def restore(output: Any) -> Any:
        if not hidden:
            requested = {key: value for key, value in output.items() if not key.endswith("hidden_states")}
            output = type(output)(**requested)
        return output if named else output.to_tuple()

    return restore

"""Distillation: draw a prompt to a teacher that is another prompt on the same frozen model, or the model with a longer text.

The model runs twice, once as the teacher, without gradients and at rest; there is no second model in memory. What is compared
are logits where a label is, and hidden states wherever text is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import at_rest
from softhooks.compat.sharding import gather_again
from softhooks.errors import UnsupportedModeError
from softhooks.objectives.base import Finish, Objective, PromptOnModel, Texts, kl_divergence, with_loss

IGNORED = -100

Speak = Callable[["PromptOnModel"], AbstractContextManager[None] | None]
"""Lets the teacher speak in the model's forwards inside the context; None: there is nothing to learn from it now."""


class Distillation(Objective):
    """Train on `L + weight * (KL(teacher || student) + MSE(hidden states))`.

    Logits are compared where a label is: these are the distributions that the model's own loss trains. Hidden states are the last
    ones, of every text token that the attention mask shows; in an encoder-decoder those of the encoder's text and of the labeled
    decoder tokens, half each. Both terms are sums over labels divided by as many labels as the model's loss is, a row's hidden
    states having the weight of its labels: so gradients that are accumulated equal those of one large batch. Of documents packed
    into one row each counts as a row.

    Args:
        weight: lambda.
        speak: lets the teacher speak.
    """

    def __init__(self, weight: float, speak: Speak) -> None:
        self.weight = weight
        self.speak = speak

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish | None:
        """Run the teacher, and let the student show its hidden states.

        Raises:
            UnsupportedModeError: the call does not begin with the text, or its labels are no classes.
        """
        context = self.speak(prompt)
        if context is None:
            return None
        lesson = Lesson.of(prompt, call)
        view = _View.of(prompt.model, call)
        with torch.no_grad(), at_rest(prompt.model), prompt.without_objective(), context:
            taught = lesson.read(prompt.model(**call, **given))
        gather_again(prompt.model)

        def finish(output: Any) -> Any:
            divergence, distance = lesson.compare(taught, lesson.read(output))
            loss = output["loss"] + self.weight * (divergence + distance)
            return view.show(with_loss(output, loss, has_loss=True))

        return finish


@dataclass(frozen=True)
class Lesson:
    """What a teacher and a student are compared in.

    Attributes:
        labeled: which logits a label is for, [B, T] bool, or [B] for a classifier of rows.
        text: which columns are text, [B, T] bool.
        texts: what stands in the rows.
        share: the part of the loss's labels that each text has, [B], or more where documents are packed.
        count: how many labels the loss is divided by.
        two_stacks: whether there is a decoder beside the text's encoder.
    """

    labeled: Tensor
    text: Tensor
    texts: Texts
    share: Tensor
    count: Tensor
    two_stacks: bool

    @classmethod
    def of(cls, prompt: PromptOnModel, call: dict[str, Any]) -> Lesson:
        """Read the masks and labels of a call.

        Raises:
            UnsupportedModeError: it does not begin with the text, or its labels are no classes.
        """
        _check(call)
        labels = call["labels"]
        given = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        assert given is not None
        mask = call.get("attention_mask")
        text = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask is None else mask.bool()
        labeled = _labeled(prompt, call)
        is_one = labeled.shape == text.shape and not prompt.structure.is_encoder_decoder
        texts = Texts.of(call if is_one else {}, text)
        rows = texts.sums(labeled.long()) if is_one else labeled.long().reshape(len(labeled), -1).sum(-1)
        count = call.get("num_items_in_batch")
        count = torch.as_tensor(rows.sum() if count is None else count, device=labels.device).clamp(min=1)
        return cls(labeled, text, texts, rows / count, count, prompt.structure.is_encoder_decoder)

    def read(self, output: Any) -> tuple[Tensor, list[Tensor]]:
        """Take from an output the logits of labels, [N, V], and the last hidden states of each stack, [B, T, H]."""
        logits = output.logits
        if logits.shape[:-1] != self.labeled.shape or logits.shape[-1] < 2:
            raise UnsupportedModeError(
                "a student learns from its teacher's distribution over classes, of which each has a label.",
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
        """The divergence of the logits and the distance of the states, both exactly 0 between equals."""
        divergence = kl_divergence(teacher[0], student[0]).sum() / self.count
        columns = [self.text, self.labeled]
        apart = [
            (mean_square(*states, columns[stack], self.texts) * self.share).sum()
            for stack, states in enumerate(zip(teacher[1], student[1], strict=True))
        ]
        return divergence, torch.stack(apart).mean()


def mean_square(teacher: Tensor, student: Tensor, shown: Tensor, texts: Texts) -> Tensor:
    """Each text's mean square difference over the columns that are shown, in fp32. [B, T, H], [B, T] -> [texts]."""
    squares = (teacher.float() - student.float()).square().mean(-1).masked_fill(~shown, 0.0)
    return texts.sums(squares) / texts.sums(shown.long()).clamp(min=1)


def _labeled(prompt: PromptOnModel, call: dict[str, Any]) -> Tensor:
    """Which logits the model's own loss compares with a label."""
    if call.get("shift_labels") is not None:
        return torch.as_tensor(call["shift_labels"] != IGNORED)
    labeled: Tensor = call["labels"] != IGNORED
    stack = prompt.structure.entry
    can_generate = getattr(prompt.model, "can_generate", None)
    if stack.name == "text" and stack.causal and can_generate is not None and can_generate():
        nothing = torch.zeros_like(labeled[:, :1])
        labeled = torch.cat([labeled[:, 1:], nothing], 1)  # a language model's logits answer to the next token's label
    return labeled


def _check(call: dict[str, Any]) -> None:
    mask, labels = call.get("attention_mask"), call["labels"]
    begun = [name for name in ("past_key_values", "encoder_outputs") if call.get(name) is not None]
    if begun:
        raise UnsupportedModeError(
            "where a teacher reads the text too, a call must begin with the text.",
            f"Leave out {' and '.join(begun)}, which one prompt alone has made.",
            given=", ".join(begun),
        )
    if (mask is not None and mask.dim() != 2) or labels.is_floating_point():
        raise UnsupportedModeError(
            "distillation needs to know which columns are text, and which classes the labels name.",
            "Give a mask of one number a token, and labels that are whole numbers.",
            attention_mask="none" if mask is None else list(mask.shape),
            labels=f"{list(labels.shape)} {labels.dtype}",
        )


@dataclass(frozen=True)
class _View:
    """How the caller wants to see the output, which names its hidden states for us meanwhile."""

    hidden_states: bool
    named: bool

    @classmethod
    def of(cls, model: Any, call: dict[str, Any]) -> _View:
        """Note what is asked for, and ask for hidden states, by name."""
        hidden, named = call.get("output_hidden_states"), call.get("return_dict")
        hidden = getattr(model.config, "output_hidden_states", False) if hidden is None else hidden
        named = getattr(model.config, "return_dict", True) if named is None else named
        call["output_hidden_states"] = True
        if not named:
            call["return_dict"] = True
        return cls(bool(hidden), bool(named))

    def show(self, output: Any) -> Any:
        """Drop what was not asked for."""
        if not self.hidden_states:
            kept = {key: value for key, value in output.items() if not key.endswith("hidden_states")}
            output = type(output)(**kept)
        return output if self.named else output.to_tuple()

"""Self-distillation: a prompt learns to do what a document in the context does, with the bare model as its own teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.module_walk import every_tensor
from softhooks.backbone.stack import Role, Stack, at_rest
from softhooks.errors import UnsupportedMethodError, UnsupportedModeError
from softhooks.inject.prefix.key_values import KeyValues, split
from softhooks.inject.reuse import Memory
from softhooks.inject.text_key_values import key_values_of
from softhooks.objectives.base import Finish, Objective, PromptOnModel, kl_divergence, with_loss

_OF_THE_STUDENT = (
    "labels",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)
"""Arguments of a call that are none of the teacher's."""


class SelfDistillation(Objective):
    """KL(teacher || student) where the next token is labeled: the teacher reads a document, the student has the prompt instead.

    Args:
        document: the ids that the teacher reads before each row.
        top_k: how many of the teacher's likeliest tokens are told apart.
    """

    def __init__(self, document: Sequence[int], top_k: int) -> None:
        self.document = torch.tensor(list(document), dtype=torch.long)
        self.top_k = top_k
        self._memory: Memory[dict[str, Tensor]] = Memory()

    def check(self, prompt: PromptOnModel) -> None:
        """Check that the model is a causal language model.

        Raises:
            UnsupportedMethodError: it is not.
        """
        stack = prompt.structure.entry
        can_generate = getattr(prompt.model, "can_generate", None)
        if stack.name == "text" and stack.causal and can_generate is not None and can_generate():
            return
        raise UnsupportedMethodError(
            "self-distillation needs a causal language model: it compares what is predicted next.",
            "Choose distill=False, to train on the model's own loss.",
            model=type(prompt.model).__name__,
        )

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish:
        """Ask the teacher, and take the labels: they only say where the two are compared."""
        labels = call.pop("labels")
        items = call.pop("num_items_in_batch", None)
        chosen = labels[:, 1:] != -100
        wanted = self._teach(prompt, call, chosen)

        def finish(output: Any) -> Any:
            found = _select(output[0] if isinstance(output, tuple) else output.logits, chosen)
            total = kl_divergence(wanted, found, self.top_k).sum()
            count = chosen.sum().clamp(min=1) if items is None else items
            count = count.to(total.device) if isinstance(count, Tensor) else count
            return with_loss(output, total / count, has_loss=False)

        return finish

    def _teach(self, prompt: PromptOnModel, call: dict[str, Any], chosen: Tensor) -> Tensor:
        """The teacher's logits where they are compared, [N, V]."""
        if call.get("past_key_values") is not None:
            raise UnsupportedModeError("self-distillation runs each text twice; train without `past_key_values`.")
        asked = {key: value for key, value in call.items() if key not in _OF_THE_STUDENT}
        with at_rest(prompt.model), prompt.without_objective():
            tables = self._read(prompt)
            with prompt.standing_in(lambda stack: _as_prefix(prompt, stack, tables)):
                output = prompt.model(**asked, use_cache=False, return_dict=True)
        return _select(output.logits, chosen)

    def _read(self, prompt: PromptOnModel) -> dict[str, Tensor]:
        """The document's keys and values; read once inside `softhooks.kept`, else in every step."""
        structure = prompt.structure
        stack = structure.entry
        return self._memory.recall(
            stack, (), every_tensor(stack.module), lambda: key_values_of(structure, self.document)
        )


def _as_prefix(prompt: PromptOnModel, stack: Stack, tables: dict[str, Tensor]) -> dict[Role, KeyValues]:
    prefix = split(tables[stack.name], stack.sites_of("self"))
    prefix.windowed = bool(prompt.conventions["windowed"])
    prefix.shifted = bool(prompt.conventions["shift_positions"])
    return {"self": prefix}


def _select(logits: Tensor, chosen: Tensor) -> Tensor:
    """The logits of the positions whose next token is chosen. [B, T, V] and [B, T - 1] -> [N, V]."""
    if logits.shape[1] != chosen.shape[1] + 1:
        raise UnsupportedModeError(
            "self-distillation needs the logits of every column that has a label.",
            "Call the model without `logits_to_keep`.",
            logits=list(logits.shape),
            labels=f"{chosen.shape[1] + 1} columns",
        )
    return logits[:, :-1][chosen.to(logits.device)]

"""Self-distillation: a prompt learns to replace a document that its teacher, the frozen model, reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.heads import is_causal_lm
from softhooks.backbone.module_walk import every_tensor
from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import Role, Stack
from softhooks.compat.cache_argument import CACHE, cache_in
from softhooks.errors import UnsupportedMethodError, UnsupportedModeError
from softhooks.inject.capture import key_values_of
from softhooks.inject.prefix.key_values import KeyValues, split
from softhooks.inject.reuse import ResultCache
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.objectives.base import Finish, Objective, PromptOnModel, with_loss
from softhooks.objectives.losses import kl_divergence, require_logits

_STUDENT_ONLY = (
    "labels",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)
"""Arguments that the teacher's forward does not get."""


class SelfDistillation(Objective):
    """KL(teacher || student) of the predictions at labeled tokens.

    The teacher is the frozen model with the document before each row; the student has the prompt instead.

    Args:
        document: the token ids of the document.
        top_k: the number of the teacher's most likely tokens that are compared individually.
    """

    def __init__(self, document: Sequence[int], top_k: int) -> None:
        self.document = torch.tensor(list(document), dtype=torch.long)
        self.top_k = top_k
        self._memory: ResultCache[dict[str, Tensor]] = ResultCache()

    def check(self, prompt: PromptOnModel) -> None:
        """Refuse a model that is not a causal language model."""
        if is_causal_lm(prompt.model, prompt.structure):
            return
        raise UnsupportedMethodError(
            f"{type(prompt.model).__name__} is not a causal language model, which self-distillation needs.",
            "Use distill=False to train on the model's own loss.",
            model=type(prompt.model).__name__,
        )

    def begin(self, prompt: PromptOnModel, call: dict[str, Any], given: dict[str, Tensor]) -> Finish:
        """Run the teacher, and remove the labels from the call, so that the model does not compute its own loss."""
        labels = call.pop("labels")
        items = call.pop("num_items_in_batch", None)
        compared = labels[:, 1:] != IGNORE_INDEX
        target = self._teach(prompt, call, compared)

        def finish(output: Any) -> Any:
            predicted = _select(output[0] if isinstance(output, tuple) else output.logits, compared)
            total = kl_divergence(target, predicted, self.top_k).sum()
            count = compared.sum().clamp(min=1) if items is None else items
            count = count.to(total.device) if isinstance(count, Tensor) else count
            return with_loss(output, total / count, has_loss=False)

        return finish

    def _teach(self, prompt: PromptOnModel, call: dict[str, Any], compared: Tensor) -> Tensor:
        """Compute the teacher's logits for the labeled tokens, [N, V]."""
        if cache_in(call) is not None:
            raise UnsupportedModeError(
                f"the call has `{CACHE}`, but self-distillation must run each sequence from its start. Train without them."
            )
        inputs = {key: value for key, value in call.items() if key not in _STUDENT_ONLY}
        with eval_mode(prompt.model), prompt.without_objective():
            tables = self._read(prompt)
            # The document's keys and values are computed at batch size 1 and, like a prompt's, shared by all rows.
            with prompt.with_key_values(lambda stack: _as_prefix(prompt, stack, tables)):
                output = prompt.model(**inputs, use_cache=False, return_dict=True)
        return _select(output.logits, compared)

    def _read(self, prompt: PromptOnModel) -> dict[str, Tensor]:
        """Return the document's keys and values; they are computed in every step or, inside `softhooks.kept`, only once."""
        structure, stack = prompt.structure, prompt.structure.entry
        return self._memory.get(stack, (), every_tensor(stack.module), lambda: key_values_of(structure, self.document))


def _as_prefix(prompt: PromptOnModel, stack: Stack, tables: dict[str, Tensor]) -> dict[Role, KeyValues]:
    prefix = split(tables[stack.name], stack.sites_of("self"))
    prefix.windowed = bool(prompt.conventions["windowed"])
    prefix.shifted = bool(prompt.conventions["shift_positions"])
    return {"self": prefix}


def _select(logits: Tensor, compared: Tensor) -> Tensor:
    """Select the logits that predict labeled tokens. [B, T, V], [B, T - 1] -> [N, V]."""
    require_logits(logits, compared.shape[0], compared.shape[1] + 1)
    return logits[:, :-1][compared.to(logits.device)]

"""The ids that stand behind virtual tokens, in models that look at ids beyond the lookup of embeddings.

Gemma 3n and Gemma 4 look up an embedding for each layer, DeepSeek-V4 routes tokens to experts by a table of ids. There a virtual
token needs an id, and a prompt's result depends on it. Rows that start as words keep the ids of these words, so that a prompt of
real words is those words. Other rows get what transformers gives to tokens without an id (the places of images): the padding id
of the text's config, or 0. The ids are stored with the prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import _text_config, as_choices, decoder_ids, ordinary_ids, probe_ids, special_ids
from softhooks.backbone.probing import eval_mode, last_hidden_state, probing
from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import words_among
from softhooks.errors import PromptMismatchError

BUFFER = "placeholder"
"""The name of a prompt's ids in its module, and among its stored conventions."""

_COLUMNS = 5


def reads_ids(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether a model's states depend on ids beside their embeddings: measured once, with two texts of the same embeddings."""
    stack = structure.entry
    if stack.reads_ids is None:
        stack.reads_ids = _states_differ(model, structure)
    return stack.reads_ids


class _Rows:
    """What an embedding returns in a first forward, given again in the next one, call by call."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self._runs = self._calls = 0

    def begin(self) -> None:
        self._runs, self._calls = self._runs + 1, 0

    def embed(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        self._calls += 1
        if self._runs == 1:
            self.kept.append(output)
            return None
        return self.kept[self._calls - 1] if self._calls <= len(self.kept) else output


def _states_differ(model: nn.Module, structure: ModelStructure) -> bool:
    """Run two texts whose ids differ and whose embeddings are made the same."""
    stack, vocabulary = structure.entry, structure.vocabulary
    ordinary = ordinary_ids(model, stack, vocabulary)
    if len(ordinary) < 2:
        return True  # nothing to compare
    end = probe_ids(model, vocabulary, 1)  # some heads look for it
    texts = [
        torch.cat([torch.tensor([[ordinary[(k + shift) % len(ordinary)] for k in range(_COLUMNS)]]).to(end), end], 1)
        for shift in (0, max(1, min(_COLUMNS, len(ordinary) // 2)))
    ]
    rows, states = _Rows(), []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(last_hidden_state(output).float())

    handles = [stack.embedding.register_forward_hook(rows.embed), stack.module.register_forward_hook(keep)]
    try:
        with eval_mode(model), probing(model):
            for text in texts:
                rows.begin()
                given = text if structure.choices is None else as_choices(text, structure.choices)
                more = {"decoder_input_ids": decoder_ids(texts[0])} if structure.is_encoder_decoder else {}
                model(input_ids=given, attention_mask=torch.ones_like(given), **more)
    finally:
        for handle in handles:
            handle.remove()
    scale = states[0].abs().amax().clamp(min=1e-6)
    precision = torch.finfo(rows.kept[0].dtype).eps
    return bool((states[-1] - states[0]).abs().amax() > 16 * precision * scale)


def usual_id(model: nn.Module, vocabulary: int) -> int:
    """What transformers puts where a token has no id of its own: the text's padding id, or 0 where it has none."""
    pad = getattr(_text_config(getattr(model, "config", None)), "pad_token_id", None)
    pad = pad[0] if isinstance(pad, (list, tuple)) and pad else pad
    return pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0


def fresh_ids(
    model: nn.Module, structure: ModelStructure, count: int, known: Sequence[int | None] | None, rows: Tensor | None
) -> Tensor:
    """The ids behind a new prompt's virtual tokens: those of the words that it starts from, else the usual one. -> [P].

    Args:
        known: the ids of these words, None for a row that is no word; None: they are looked up by the rows.
        rows: the prompt's embedding rows, [P, H].
    """
    usual = usual_id(model, structure.vocabulary)
    if known is None:
        alone = rows is not None and rows.shape == (count, structure.entry.width)
        known = words_among(structure, rows) if rows is not None and alone else [None] * count
    return torch.tensor([usual if word is None else word for word in known])


def stored_ids(
    model: nn.Module, structure: ModelStructure, count: int, conventions: dict[str, Any], source: str, *, needed: bool
) -> tuple[Tensor | None, dict[str, Any]]:
    """The ids behind a saved prompt's virtual tokens, [P], and its other conventions.

    Where a file has none and the model looks at them, they are those of the rule before they were stored.

    Warns:
        UserWarning: the file has none, and the model looks at them.

    Raises:
        PromptMismatchError: they are not in the model's vocabulary.
    """
    held = conventions.get(BUFFER)
    others = {key: value for key, value in conventions.items() if key != BUFFER}
    if held is not None:
        if max(held) >= structure.vocabulary:
            raise PromptMismatchError(
                "the ids behind a prompt's virtual tokens must be in the model's vocabulary.",
                "Load it onto the base model that it was trained with.",
                prompt=f"{source}: ids up to {max(held)}",
                vocabulary=f"0 to {structure.vocabulary - 1}",
            )
        return torch.tensor(list(held)), others
    if not needed:
        return None, others
    special = special_ids(getattr(model, "config", None))
    rule = next((one for one in range(min(structure.vocabulary, 64)) if one not in special), 0)
    warnings.warn(
        f"{source} was saved by a softhooks that did not store the id behind virtual tokens, on which {type(model).__name__} "
        f"depends. {rule} is taken: the first id that is none of the special ids in the config. If these were others in training "
        "(`pad_token_id`), set them as they were, load the prompt again and save it.",
        UserWarning,
        stacklevel=2,
    )
    return torch.full((count,), rule), others

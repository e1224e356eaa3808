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

from softhooks.backbone.probe_inputs import special_ids, text_config
from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import words_among
from softhooks.errors import PromptMismatchError

BUFFER = "placeholder"
"""The name of a prompt's ids in its module, and among its stored conventions."""


def usual_id(model: nn.Module, vocabulary: int) -> int:
    """What transformers puts where a token has no id of its own: the text's padding id, or 0 where it has none."""
    pad = getattr(text_config(getattr(model, "config", None)), "pad_token_id", None)
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

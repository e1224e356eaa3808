"""The token ids of virtual tokens, for models whose hidden states depend on token ids and not only on embeddings.

Gemma 3n and Gemma 4 use the id to look up an embedding for each layer, and DeepSeek-V4 to choose experts. A virtual token that is
initialized from a word gets the word's id, so that it initially acts like the word. Any other virtual token gets the id that
transformers uses for tokens without an id, such as image tokens. The ids are saved with the prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import special_ids, text_config
from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import ids_of_rows
from softhooks.errors import PromptMismatchError

BUFFER = "placeholder"
"""The name of the ids, both as a buffer of the prompt's module and among the options of the forward pass in a saved prompt."""


def default_id(model: nn.Module, vocabulary: int) -> int:
    """Return the id that transformers uses for a token without an id: the padding id of the text config, or 0."""
    pad = getattr(text_config(getattr(model, "config", None)), "pad_token_id", None)
    pad = pad[0] if isinstance(pad, (list, tuple)) and pad else pad
    return pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0


def new_placeholder_ids(
    model: nn.Module, structure: ModelStructure, count: int, known: Sequence[int | None] | None, rows: Tensor | None
) -> Tensor:
    """Choose the ids of a new prompt's virtual tokens, [P].

    Args:
        count: P.
        known: the ids of the words that initialize the prompt, with None for a row without a word. If `known` is None,
            each of `rows` is looked up in the model's embeddings.
        rows: the prompt's embeddings, [P, H].
    """
    default = default_id(model, structure.vocabulary)
    if known is None:
        is_plain = rows is not None and rows.shape == (count, structure.entry.width)
        known = ids_of_rows(structure, rows) if rows is not None and is_plain else [None] * count
    return torch.tensor([default if id_ is None else id_ for id_ in known])


def saved_placeholder_ids(
    model: nn.Module, structure: ModelStructure, count: int, conventions: dict[str, Any], source: str, *, needed: bool
) -> tuple[Tensor | None, dict[str, Any]]:
    """Return the ids of a saved prompt's virtual tokens, [P], and the other options of the forward pass saved with it.

    Args:
        count: P.
        conventions: the options of the forward pass that were saved with the prompt, including the ids.
        source: the prompt's name, for messages.
        needed: whether the model's hidden states depend on ids. If so, and the file has no ids, warn and give all virtual
            tokens the id that older versions of softhooks used.

    Raises:
        PromptMismatchError: the model's vocabulary does not contain the ids.
    """
    saved = conventions.get(BUFFER)
    others = {key: value for key, value in conventions.items() if key != BUFFER}
    if saved is not None:
        if max(saved) >= structure.vocabulary:
            raise PromptMismatchError(
                "the prompt's virtual tokens have ids that are not in the model's vocabulary.",
                "Load the prompt onto the base model that it was trained with.",
                prompt=f"{source}: ids up to {max(saved)}",
                vocabulary=f"0 to {structure.vocabulary - 1}",
            )
        return torch.tensor(list(saved)), others
    if not needed:
        return None, others
    special = special_ids(getattr(model, "config", None))
    first = next((one for one in range(min(structure.vocabulary, 64)) if one not in special), 0)
    warnings.warn(
        f"{source} was saved by an older version of softhooks, without the token ids of its virtual tokens, which "
        f"{type(model).__name__} needs. The id {first} is used, the first that is not a special token in the config. If the "
        "config had other special ids (such as `pad_token_id`) in training, restore them, then load and save the prompt again.",
        UserWarning,
        stacklevel=2,
    )
    return torch.full((count,), first), others

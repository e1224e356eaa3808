"""The token ids of virtual tokens, for models whose states depend on ids apart from their embeddings.

Gemma 3n and Gemma 4 look up one embedding for each layer, and DeepSeek-V4 chooses experts by a table of ids. In these models a
virtual token needs an id, and its effect depends on the id. A row that starts as a word has the id of that word, so that a prompt
of real words has the same effect as the words. Any other row has the id that transformers uses for tokens without an id, such as
image tokens: the padding id of the text config, or 0. The ids are saved with the prompt.
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
"""The name of a prompt's ids in its module, and among its saved conventions."""


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
        known: the ids of the words that the prompt starts from, with None for a row that is not a word; or None to find the
            ids by the rows.
        rows: the prompt's embedding rows, [P, H].
    """
    default = default_id(model, structure.vocabulary)
    if known is None:
        is_plain = rows is not None and rows.shape == (count, structure.entry.width)
        known = ids_of_rows(structure, rows) if rows is not None and is_plain else [None] * count
    return torch.tensor([default if id_ is None else id_ for id_ in known])


def saved_placeholder_ids(
    model: nn.Module, structure: ModelStructure, count: int, conventions: dict[str, Any], source: str, *, needed: bool
) -> tuple[Tensor | None, dict[str, Any]]:
    """Read the ids of a saved prompt's virtual tokens, [P], from its conventions.

    Args:
        count: P.
        needed: whether the model's states depend on ids. If so, a file without ids gets the default of the versions that did
            not save ids.

    Returns:
        the ids, and the other conventions.

    Warns:
        UserWarning: the file has no ids, and the model needs them.

    Raises:
        PromptMismatchError: the model's vocabulary does not contain the ids.
    """
    saved = conventions.get(BUFFER)
    others = {key: value for key, value in conventions.items() if key != BUFFER}
    if saved is not None:
        if max(saved) >= structure.vocabulary:
            raise PromptMismatchError(
                "the virtual tokens of the prompt have ids that are not in the model's vocabulary.",
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
        f"{source} was saved by a version of softhooks that did not store the ids of virtual tokens, on which "
        f"{type(model).__name__} depends. The first id that is not a special id of the config is used: {first}. If the special "
        "ids were different in training (`pad_token_id`), set them as they were, load the prompt again and save it.",
        UserWarning,
        stacklevel=2,
    )
    return torch.full((count,), first), others

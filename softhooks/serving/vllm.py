"""The body of a request to vLLM with prompt embeddings."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

from softhooks.errors import OptionError


def request(model: str, rows: Tensor, **options: Any) -> dict[str, Any]:
    """Return the JSON body for `/v1/completions`.

    Args:
        model: the name under which the server has the base model.
        rows: the embeddings of prompt and text, from `embeddings`, [P + T, H].
        options: other fields of the request, such as `max_tokens`, `temperature` and `stream`.

    Raises:
        OptionError: the options contain a second prompt.
    """
    if options.get("prompt"):
        raise OptionError(
            f"`prompt` is {options['prompt']!r}, but the embeddings already contain the text; pass one of them.",
            "Leave `prompt` out.",
        )
    return {"model": model, "prompt_embeds": encode(rows), **options}


def encode(rows: Tensor) -> str:
    """Encode a tensor for the server: `torch.save` in base64."""
    buffer = io.BytesIO()
    torch.save(rows.detach().cpu().contiguous().clone(), buffer)  # a clone: a view would save its whole storage
    return base64.b64encode(buffer.getvalue()).decode("ascii")

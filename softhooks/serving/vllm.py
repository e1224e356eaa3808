"""The body of a request to vLLM with prompt embeddings."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

from softhooks.errors import OptionError


def request(model: str, rows: Tensor, **options: Any) -> dict[str, Any]:
    """The JSON body for `/v1/completions`.

    Args:
        model: the name under which the server has the base model.
        rows: what `embeddings` made.
        options: of the request, such as `max_tokens`, `temperature` and `stream`.

    Raises:
        OptionError: the options say another prompt.
    """
    if options.get("prompt"):
        raise OptionError(
            "a request says its prompt once: as embeddings of the whole text, or as text.",
            "Leave `prompt` out; the rows hold the text already.",
            prompt=repr(options["prompt"]),
        )
    return {"model": model, "prompt_embeds": encode(rows), **options}


def encode(rows: Tensor) -> str:
    """A tensor as the server reads it: written by `torch.save`, in base64."""
    buffer = io.BytesIO()
    torch.save(rows.detach().cpu().contiguous().clone(), buffer)  # a clone: a view would bring its whole storage along
    return base64.b64encode(buffer.getvalue()).decode("ascii")

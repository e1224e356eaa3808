"""The body of a request to SGLang with input embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.errors import OptionError


def request(rows: Tensor, *, sampling_params: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The JSON body for `/generate`.

    Args:
        rows: what `embeddings` made.
        sampling_params: of the request, such as `max_new_tokens` and `temperature`.
        options: more of its fields, such as `stream`.

    Raises:
        OptionError: the options say another prompt.
    """
    others = [name for name in ("text", "input_ids") if options.get(name) is not None]
    if others:
        raise OptionError(
            "a request says its prompt once: as text, as ids, or as embeddings.",
            "Leave the others out; the rows hold the text already.",
            others=", ".join(others),
        )
    return {
        "input_embeds": rows.detach().float().cpu().tolist(),
        "sampling_params": dict(sampling_params or {}),
        **options,
    }

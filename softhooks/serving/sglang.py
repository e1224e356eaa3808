"""The body of a request to SGLang with input embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softhooks.errors import OptionError


def request(rows: Tensor, *, sampling_params: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the JSON body for `/generate`.

    Args:
        rows: the embeddings of prompt and text, from `embeddings`, [P + T, H].
        sampling_params: such as `max_new_tokens` and `temperature`.
        options: other fields of the request, such as `stream`.

    Raises:
        OptionError: the options contain a second prompt.
    """
    others = [name for name in ("text", "input_ids") if options.get(name) is not None]
    if others:
        raise OptionError(
            f"{' and '.join(f'`{name}`' for name in others)} cannot be passed: the embeddings already contain the text.",
            "Leave it out.",
        )
    return {
        "input_embeds": rows.detach().float().cpu().tolist(),
        "sampling_params": dict(sampling_params or {}),
        **options,
    }

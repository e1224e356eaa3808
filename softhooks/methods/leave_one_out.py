"""Leave-one-out: a training row that is also an example in the prompt does not attend to this example."""

from __future__ import annotations

import torch
from torch import Tensor

from softhooks.errors import UnsupportedModeError
from softhooks.prompt_encoder import require_column

EXAMPLE_IDS = "example_ids"
"""The batch column with the index of each row's own example, or -1 if the row is not an example."""


def hide_own_example(
    given: dict[str, Tensor], batch: int, owners: Tensor, count: int, *, required: bool
) -> Tensor | None:
    """Return which virtual tokens to hide from each row, [B, P] bool; None if the call has no `example_ids`.

    Args:
        given: the batch columns of the call.
        batch: the number of rows.
        owners: the index of the example that each virtual token belongs to, or -1 for none, [P].
        count: the number of examples.
        required: raise an error if the call has no `example_ids`.
    """
    if required:
        reason = "a row that is an example must not attend to itself; use -1 for other rows, or leave_one_out=False"
        require_column(given, EXAMPLE_IDS, reason)
    if EXAMPLE_IDS not in given:
        return None
    rows = _checked(given[EXAMPLE_IDS], batch, count).to(owners.device)[:, None]
    return (owners == rows) & (rows >= 0)


def _checked(rows: Tensor, batch: int, count: int) -> Tensor:
    whole = not rows.is_floating_point() and rows.dtype != torch.bool
    if whole and rows.numel() == batch and int(rows.min()) >= -1 and int(rows.max()) < count:
        return rows.reshape(batch)
    found = f"{rows.dtype} {list(rows.shape)}, {rows.flatten().tolist()[:8]}"
    raise UnsupportedModeError(
        f"`{EXAMPLE_IDS}` is {found}; it must contain the index of each row's own example, counted from 0, or -1 for a row "
        "that is not an example.",
        "Pass one whole number for each row.",
        example_ids=found,
        batch=batch,
        examples=count,
    )

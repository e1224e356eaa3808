"""The slots of a batch: where they are in each row, and their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import UnsupportedModeError
from softhooks.layout.layout import Layout
from softhooks.layout.slot_map import Places
from softhooks.layout.template import COLUMN


@dataclass
class Slots:
    """The slots of a batch, and the prompts whose virtual tokens are inserted there.

    Attributes:
        tables: the embeddings of each prompt, [P, H].
        choice: the index of each row's prompt (None for a row without a prompt); None if every row has the first prompt.
        given: the extra arguments of the forward, such as `soft_slots`, by name.
        searched: the length of the text passed to `generate`; layouts look for anchors only in this text. None if unknown.
        ids: the placeholder ids of each prompt, [P], or None if the stack reads only embeddings.
    """

    tables: Sequence[Tensor]
    layouts: Sequence[Layout]
    choice: Sequence[int | None] | None
    given: dict[str, Tensor]
    searched: int | None = None
    ids: Sequence[Tensor] | None = None

    @property
    def columns(self) -> int:
        """The largest number of slots of a prompt (S)."""
        return max(layout.num_slots for layout in self.layouts)

    @property
    def uneven(self) -> bool:
        """Whether some row may have fewer than S slots."""
        if any(layout.form.may_skip for layout in self.layouts):
            return True
        return self.choice is not None and any(
            row is None or self.layouts[row].num_slots < self.columns for row in self.choice
        )

    def places(self, mask: Tensor, ids: Tensor | None) -> Places:
        """Find the places of the slots in a text from its mask and its ids (None if the call passes embeddings), [B, T] each."""
        batch, columns = mask.shape
        if self.searched is not None and any(layout.form.searches for layout in self.layouts):
            if columns < self.searched:
                raise UnsupportedModeError(
                    f"the first chunk has {columns} of {self.searched} tokens; a layout that looks for anchors or for the end "
                    "of the text must get the whole text at once.",
                    "Leave `prefill_chunk_size` out.",
                )
            mask, ids = mask[:, : self.searched], None if ids is None else ids[:, : self.searched]
        given = self.given.get(COLUMN)
        if self.choice is None:
            return self.layouts[0].places(mask, ids, given, range(batch))
        offsets = torch.zeros(batch, self.columns, dtype=torch.long, device=mask.device)
        live = torch.zeros_like(offsets, dtype=torch.bool)
        for part, layout in enumerate(self.layouts):
            rows = [row for row, chosen in enumerate(self.choice) if chosen == part]
            index = torch.tensor(rows, device=mask.device)
            own = None if given is None else given.to(mask.device)[index, : layout.num_slots]
            found = layout.places(mask[index], None if ids is None else ids[index], own, rows)
            offsets[index, : layout.num_slots] = found.offsets
            live[index, : layout.num_slots] = found.live
        return Places(offsets, live)

    def stacked(self, like: Tensor) -> Tensor:
        """Return the embeddings of all slots, [1 or B, S, H], in the dtype of `like`."""
        return self._stacked(self.tables, like)

    def stacked_ids(self, like: Tensor) -> Tensor | None:
        """Return the placeholder ids of all slots, [1 or B, S], or None if the stack reads only embeddings."""
        return None if self.ids is None else self._stacked([ids[:, None] for ids in self.ids], like)[..., 0]

    def _stacked(self, tables: Sequence[Tensor], like: Tensor) -> Tensor:
        """Select the row of each slot from its prompt's table. [P, N] -> [1 or B, S, N]."""
        each = [
            table if layout.form.table_rows == list(range(table.shape[0])) else table[layout.form.table_rows]
            for table, layout in zip(tables, self.layouts, strict=True)
        ]
        if self.choice is None:
            return each[0].to(like)[None]
        # Unused slots, and rows without a prompt, get zeros.
        padded = [functional.pad(rows, (0, 0, 0, self.columns - rows.shape[0])) for rows in each]
        table = torch.stack([*padded, torch.zeros_like(padded[0])]).to(like)
        index = [len(padded) if row is None else row for row in self.choice]
        return table[torch.tensor(index, device=like.device)]

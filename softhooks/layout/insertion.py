"""Layouts for tokenized batches: slots at the ends of a row and next to anchors, which are found in the row's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from softhooks.errors import OptionError, UnsupportedModeError, check_int
from softhooks.layout.anchors import Anchor, Which, anchor_of, ids_from_json
from softhooks.layout.slot_map import Places

Missing = Literal["error", "skip"]
At = Literal["start", "first", "after", "before", "end"]
_PLACEMENTS = {"start": "front", "first": "after_first", "end": "end"}


@dataclass(frozen=True)
class Group:
    """Adjacent slots.

    Attributes:
        at: the place: before a row's first token (`start`), after it (`first`), `after` or `before` an anchor, or after the
            last token.
        count: the number of slots.
        anchor: the anchor of slots that are placed `after` or `before` an anchor.
    """

    at: At
    count: int
    anchor: Anchor | None = None


@dataclass(frozen=True)
class Insertion:
    """A layout that inserts slots into tokenized rows.

    Attributes:
        groups: the slots, in order.
        which: which match to take in a row that has an anchor more than once.
        missing: whether a row without an anchor is an error or skips the anchor's slots.

    Raises:
        OptionError: there are no slots, or `which` or `missing` has an unknown value.
    """

    groups: tuple[Group, ...]
    which: Which = "first"
    missing: Missing = "error"

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.groups:
            raise OptionError("the layout has no slots: start, after, before and end are all empty. Pass one of them.")
        if self.which not in ("first", "last") or self.missing not in ("error", "skip"):
            raise OptionError(
                f"which is {self.which!r} and missing is {self.missing!r}; which must be 'first' or 'last', and missing "
                "'error' or 'skip'."
            )

    @property
    def placement(self) -> str:
        """The name that is saved with a prompt: `front`, `after_first`, `end`, or `layout` for any other placement."""
        return _PLACEMENTS.get(self.groups[0].at, "layout") if len(self.groups) == 1 else "layout"

    @property
    def may_skip(self) -> bool:
        """Whether rows without an anchor skip its slots."""
        return self.missing == "skip" and any(group.anchor for group in self.groups)

    @property
    def searches(self) -> bool:
        """Whether the places of slots depend on the row's tokens or length."""
        return any(group.anchor or group.at == "end" for group in self.groups)

    @property
    def is_bound(self) -> bool:
        """Whether the ids of every anchor are known; otherwise a tokenizer is needed."""
        return all(group.anchor is None or group.anchor.ids for group in self.groups)

    def bound(self, tokenizer: Any) -> Insertion:
        """Return the layout with the ids of every anchor."""
        groups = (replace(group, anchor=group.anchor and group.anchor.bound(tokenizer)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    @property
    def has_tail(self) -> bool:
        """Whether slots come last, after the text."""
        return self.groups[-1].at == "end"

    @property
    def ids(self) -> list[int]:
        """The token ids of all anchors, in order."""
        sequences = [sequence for group in self.groups if group.anchor for sequence in group.anchor.ids]
        return [token for sequence in sequences for token in sequence]

    @property
    def table_rows(self) -> list[int]:
        """The row of the prompt's table that each slot takes."""
        return list(range(sum(group.count for group in self.groups)))

    @property
    def starts(self) -> dict[int, int]:
        """The rows of the table that are initialized from words; always empty."""
        return {}

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Find the anchors in a batch and the place of each slot; see `Layout.places`."""
        real = mask.bool().sum(-1)
        offsets, live = [], []
        for group in self.groups:
            # The offset of a slot is the number of real tokens before the slot: 0 at the start, 1 after the first token.
            found = torch.ones_like(real, dtype=torch.bool)
            offset = {"first": torch.ones_like(real), "end": real}.get(group.at, torch.zeros_like(real))
            if group.anchor is not None:
                found, start, end = group.anchor.find(self._ids(ids), mask, self.which)
                offset = end if group.at == "after" else start
                self._check_found(found, group.anchor, rows)
            offsets.append(offset[:, None].expand(-1, group.count))
            live.append(found[:, None].expand(-1, group.count))
        return Places(torch.cat(offsets, 1), torch.cat(live, 1))

    def _ids(self, ids: Tensor | None) -> Tensor:
        if ids is None:
            raise UnsupportedModeError(
                "the call has no `input_ids`, in which the layout finds the anchors of its slots.",
                "Pass ids instead of embeddings, or use a layout with start and end only.",
                layout=self,
            )
        return ids

    def _check_found(self, found: Tensor, anchor: Anchor, rows: Sequence[int]) -> None:
        if self.missing == "skip" or bool(found.all()):
            return
        lacking = [rows[i] for i, is_there in enumerate(found.tolist()) if not is_there]
        raise UnsupportedModeError(
            f"{len(lacking)} rows of the batch do not contain the anchor {anchor.value!r}, next to which slots are placed.",
            "Truncate texts so that they keep the anchor, prefill in one chunk, or skip the slots with missing='skip'.",
            anchor=f"{anchor.value!r}, ids {' or '.join(map(str, anchor.ids))}",
            rows=f"{', '.join(map(str, lacking))} of the batch",
        )

    def probe(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ids for a test forward: every anchor, followed by these ids. [1, T] -> [1, T']."""
        row = [token for group in self.groups if group.anchor for token in group.anchor.ids[0]]
        return torch.cat([torch.tensor([row], dtype=ids.dtype, device=ids.device), ids], dim=1) if row else ids, {}

    def to_json(self) -> dict[str, Any]:
        """Return the groups as JSON values with the ids of their anchors."""
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            item: dict[str, Any] = {"at": group.at, "count": group.count}
            if group.anchor is not None:
                value = group.anchor.value
                item["anchor"] = list(value) if isinstance(value, tuple) else value
                item["ids"] = [list(sequence) for sequence in group.anchor.ids]
            groups.append(item)
        return {"insert": groups, "which": self.which, "missing": self.missing}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Insertion:
        """Make the layout from the values that `to_json` returned."""
        groups = stored["insert"]
        if not isinstance(groups, list):
            raise OptionError(f"the stored layout has the slots {groups!r}; they must be a list.")
        return cls(tuple(map(_group_from_json, groups)), stored.get("which", ""), stored.get("missing", ""))

    def __repr__(self) -> str:
        options: dict[str, Any] = {}
        for group in self.groups:
            if group.anchor is None:
                options[group.at] = group.count
            else:
                options[group.at] = options.get(group.at, {}) | {group.anchor.value: group.count}
        options |= {"which": self.which} if self.which != "first" else {}
        options |= {"missing": self.missing} if self.missing != "error" else {}
        return f"Layout.insert({', '.join(f'{key}={value!r}' for key, value in options.items())})"


_HAS_ANCHOR: dict[Any, bool] = {"after": True, "before": True, "start": False, "first": False, "end": False}


def _group_from_json(stored: Any) -> Group:
    at: Any = stored.get("at") if isinstance(stored, dict) else None
    has_anchor = _HAS_ANCHOR.get(at) if isinstance(at, str) else None
    if has_anchor is None or set(stored) - {"at", "count"} != ({"anchor", "ids"} if has_anchor else set()):
        raise OptionError(f"the slots {stored!r} of the stored layout do not have a valid place.")
    count = stored.get("count")
    check_int("count", count)
    if not has_anchor:
        return Group(at, count)
    value, ids = stored["anchor"], tuple(ids_from_json(stored["ids"]))
    anchor = anchor_of(tuple(value) if isinstance(value, list) else value, None)
    if not ids or (anchor.ids and anchor.ids != ids):
        raise OptionError(
            f"the anchor {value!r} of the stored layout has the ids {stored['ids']!r}, which are not the anchor's own."
        )
    return Group(at, count, Anchor(anchor.value, ids))

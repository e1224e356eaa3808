"""Layouts that insert slots into tokenized rows: at the ends of a row, or next to anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from softhooks.errors import MAX_VIRTUAL_TOKENS, OptionError, UnsupportedModeError, check_choice, check_int
from softhooks.layout.anchors import Anchor, Which, anchor_of, ids_from_json
from softhooks.layout.slot_map import Places

Missing = Literal["error", "skip"]
At = Literal["start", "first", "after", "before", "end"]
_PLACEMENTS = {"start": "front", "first": "after_first", "end": "end"}


@dataclass(frozen=True)
class Group:
    """Adjacent slots.

    Attributes:
        at: where the slots are inserted: before (`start`) or after (`first`) a row's first token, `after` or `before` an anchor,
            or after a row's last token (`end`).
        count: the number of slots.
        anchor: the anchor, if `at` is `after` or `before`.
    """

    at: At
    count: int
    anchor: Anchor | None = None


@dataclass(frozen=True)
class Insertion:
    """A layout that inserts slots into tokenized rows; see `Layout.insert`."""

    groups: tuple[Group, ...]
    which: Which = "first"
    missing: Missing = "error"
    starts: ClassVar[dict[int, int]] = {}
    """Empty, because no virtual tokens are initialized from words; see `Template.starts`."""

    def __post_init__(self) -> None:
        if not self.groups:
            raise OptionError("the layout has no slots; pass at least one of start, after, before and end.")
        if sum(group.count for group in self.groups) > MAX_VIRTUAL_TOKENS:
            raise OptionError(f"the layout has more than {MAX_VIRTUAL_TOKENS:,} slots, which is the maximum.")
        check_choice("which", self.which, ("first", "last"))
        check_choice("missing", self.missing, ("error", "skip"))

    @property
    def placement(self) -> str:
        """The placement as it is saved with a prompt: `front`, `after_first` or `end`, or `layout` for anything else."""
        return _PLACEMENTS.get(self.groups[0].at, "layout") if len(self.groups) == 1 else "layout"

    @property
    def may_skip(self) -> bool:
        """Whether the slots next to an anchor are left out in rows without the anchor."""
        return self.missing == "skip" and any(group.anchor for group in self.groups)

    @property
    def searches(self) -> bool:
        """Whether the positions of slots depend on a row's tokens or length."""
        return any(group.anchor or group.at == "end" for group in self.groups)

    @property
    def is_bound(self) -> bool:
        """Whether the ids of every anchor are known."""
        return all(group.anchor is None or group.anchor.ids for group in self.groups)

    def bound(self, tokenizer: Any) -> Insertion:
        """Return the layout with its anchors encoded by the tokenizer."""
        groups = (replace(group, anchor=group.anchor and group.anchor.bound(tokenizer)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    @property
    def has_tail(self) -> bool:
        """Whether there are slots after the text."""
        return self.groups[-1].at == "end"

    @property
    def ids(self) -> list[int]:
        """The ids of all anchors."""
        anchors = [group.anchor for group in self.groups if group.anchor]
        return [token for anchor in anchors for sequence in anchor.ids for token in sequence]

    @property
    def table_rows(self) -> list[int]:
        """For each slot, the index of its virtual token."""
        return list(range(sum(group.count for group in self.groups)))

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Find the anchors in a batch, and compute the places of the slots; see `Layout.places`."""
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
                "the call has no `input_ids`, in which the layout looks for its anchors.",
                "Pass `input_ids` instead of `inputs_embeds`, or use a layout with only `start` and `end`.",
                layout=self,
            )
        return ids

    def _check_found(self, found: Tensor, anchor: Anchor, rows: Sequence[int]) -> None:
        if self.missing == "skip" or bool(found.all()):
            return
        lacking = [rows[i] for i, is_there in enumerate(found.tolist()) if not is_there]
        raise UnsupportedModeError(
            f"some rows of the batch do not contain the anchor {anchor.value!r}, next to which the layout inserts slots.",
            "Truncate texts so that they keep the anchor, leave `prefill_chunk_size` out, or omit the slots with missing='skip'.",
            anchor=f"{anchor.value!r}, ids {' or '.join(map(str, anchor.ids))}",
            rows=", ".join(map(str, lacking)),
        )

    def probe(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the inputs of a test forward pass: the ids with every anchor prepended, [1, T] -> [1, T'], and an empty dict."""
        row = [token for group in self.groups if group.anchor for token in group.anchor.ids[0]]
        return torch.cat([torch.tensor([row], dtype=ids.dtype, device=ids.device), ids], dim=1) if row else ids, {}

    def to_json(self) -> dict[str, Any]:
        """Return the layout as a JSON-serializable dict, with the ids of its anchors."""
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
        """Create a layout from the result of `to_json`."""
        groups = stored["insert"]
        if not isinstance(groups, list):
            raise OptionError(f"the slots of the saved layout are {groups!r}; they must be a list.")
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
        raise OptionError(
            f"the slots {stored!r} in the saved layout have an invalid `at`, or missing or unknown entries."
        )
    count = stored.get("count")
    check_int("count", count)
    if not has_anchor:
        return Group(at, count)
    value, ids = stored["anchor"], tuple(ids_from_json(stored["ids"]))
    anchor = anchor_of(tuple(value) if isinstance(value, list) else value, None)
    if not ids or (anchor.ids and anchor.ids != ids):
        raise OptionError(
            f"the anchor {value!r} in the saved layout has the ids {stored['ids']!r}, which do not match it."
        )
    return Group(at, count, Anchor(anchor.value, ids))

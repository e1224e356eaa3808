"""Slots put into ids that exist already: at the ends of a row, and next to anchors that are found in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from softhooks.errors import OptionError, UnsupportedModeError
from softhooks.layout.anchors import Anchor, Which, anchor_of, as_ids, count_of
from softhooks.layout.slot_map import Places

Missing = Literal["error", "skip"]
At = Literal["start", "first", "after", "before", "end"]
_PLACEMENTS = {"start": "front", "first": "after_first", "end": "end"}


@dataclass(frozen=True)
class Group:
    """Slots that stand side by side.

    Attributes:
        at: where: before a row's first token, behind it, next to an anchor, or behind the last token.
        count: how many.
        anchor: what they stand `after` or `before`.
    """

    at: At
    count: int
    anchor: Anchor | None = None


@dataclass(frozen=True)
class Insertion:
    """A layout for ids that exist already.

    Attributes:
        groups: the slots, in order.
        which: the anchor's place in a row that holds it more than once.
        missing: what an anchor is that a row lacks.

    Raises:
        OptionError: there is no slot, or a word is none of those allowed.
    """

    groups: tuple[Group, ...]
    which: Which = "first"
    missing: Missing = "error"

    def __post_init__(self) -> None:
        """Check that there is something to insert."""
        if not self.groups:
            raise OptionError("a layout must hold a slot; start, after, before and end hold none.")
        if self.which not in ("first", "last") or self.missing not in ("error", "skip"):
            raise OptionError(
                "which must be 'first' or 'last', and missing 'error' or 'skip'; they are "
                f"{self.which!r} and {self.missing!r}."
            )

    @property
    def placement(self) -> str:
        """Its name among the conventions: `front`, `after_first`, `end`, or `layout` for any other."""
        return _PLACEMENTS.get(self.groups[0].at, "layout") if len(self.groups) == 1 else "layout"

    @property
    def may_skip(self) -> bool:
        """Whether a row may leave slots out."""
        return self.missing == "skip" and any(group.anchor for group in self.groups)

    @property
    def searches(self) -> bool:
        """Whether the slots' places depend on what a row holds."""
        return any(group.anchor or group.at == "end" for group in self.groups)

    @property
    def is_bound(self) -> bool:
        """Whether the ids of every anchor are known; otherwise a tokenizer must tell."""
        return all(group.anchor is None or group.anchor.ids for group in self.groups)

    def bound(self, tokenizer: Any) -> Insertion:
        """The layout with the ids of every anchor."""
        groups = (replace(group, anchor=group.anchor and group.anchor.bound(tokenizer)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    @property
    def has_tail(self) -> bool:
        """Whether slots stand behind everything else."""
        return self.groups[-1].at == "end"

    @property
    def ids(self) -> list[int]:
        """Every id that an anchor has."""
        ways = [way for group in self.groups if group.anchor for way in group.anchor.ids]
        return [token for way in ways for token in way]

    @property
    def table_rows(self) -> list[int]:
        """Which row of the prompt's table each slot takes."""
        return list(range(sum(group.count for group in self.groups)))

    @property
    def starts(self) -> dict[int, int]:
        """Which rows of the table start as which id: none."""
        return {}

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Look for the anchors in a batch; see `Layout.places`."""
        real = mask.bool().sum(-1)
        offsets, live = [], []
        for group in self.groups:
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
                "slots next to an anchor need `input_ids`: an anchor is found in ids.",
                "Pass ids in the place of embeddings, or use a layout with start and end only.",
                layout=self,
            )
        return ids

    def _check_found(self, found: Tensor, anchor: Anchor, rows: Sequence[int]) -> None:
        if self.missing == "skip" or bool(found.all()):
            return
        lacking = [rows[i] for i, is_there in enumerate(found.tolist()) if not is_there]
        raise UnsupportedModeError(
            "every row must hold the anchors that slots stand next to.",
            "Do not cut the anchor off, prefill a prompt in one chunk, or leave the slots out with missing='skip'.",
            anchor=f"{anchor.said!r}, ids {' or '.join(map(str, anchor.ids))}",
            rows=f"{', '.join(map(str, lacking))} of the batch",
        )

    def probe(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids for a probe of a model: these, behind every anchor. [1, T] -> [1, T']."""
        row = [token for group in self.groups if group.anchor for token in group.anchor.ids[0]]
        return torch.cat([torch.tensor([row], dtype=ids.dtype, device=ids.device), ids], dim=1) if row else ids, {}

    def to_json(self) -> dict[str, Any]:
        """The groups, each with its ids."""
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            told: dict[str, Any] = {"at": group.at, "count": group.count}
            if group.anchor is not None:
                said = group.anchor.said
                told |= {"anchor": list(said) if isinstance(said, tuple) else said}
                told |= {"ids": [list(way) for way in group.anchor.ids]}
            groups.append(told)
        return {"insert": groups, "which": self.which, "missing": self.missing}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Insertion:
        """The layout of what `to_json` gave."""
        groups = told["insert"]
        if not isinstance(groups, list):
            raise OptionError(f"a stored layout must list its slots; it says {groups!r}.")
        return cls(tuple(map(_group_of, groups)), told.get("which", ""), told.get("missing", ""))

    def __repr__(self) -> str:
        said: dict[str, Any] = {}
        for group in self.groups:
            if group.anchor is None:
                said[group.at] = group.count
            else:
                said[group.at] = said.get(group.at, {}) | {group.anchor.said: group.count}
        said |= {"which": self.which} if self.which != "first" else {}
        said |= {"missing": self.missing} if self.missing != "error" else {}
        return f"Layout.insert({', '.join(f'{key}={value!r}' for key, value in said.items())})"


def _group_of(told: Any) -> Group:
    """Check a group that a file holds."""
    anchored = {"after": True, "before": True, "start": False, "first": False, "end": False}
    at = told.get("at") if isinstance(told, dict) else None
    if (
        not isinstance(at, str)
        or at not in anchored
        or set(told) - {"at", "count"} != ({"anchor", "ids"} if anchored[at] else set())
    ):
        raise OptionError(f"slots of a stored layout must say where they stand; these say {told!r}.")
    count = count_of(told.get("count"), "count", least=1)
    if not anchored[at]:
        return Group(at, count)  # type: ignore[arg-type]
    said, ways = told["anchor"], tuple(as_ids(told["ids"]))
    anchor = anchor_of(tuple(said) if isinstance(said, list) else said, None)
    if not ways or (anchor.ids and anchor.ids != ways):
        raise OptionError(f"an anchor of a stored layout must have its own ids; {said!r} has {told['ids']!r}.")
    return Group(at, count, Anchor(anchor.said, ways))  # type: ignore[arg-type]

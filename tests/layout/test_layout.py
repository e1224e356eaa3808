"""Slot places in batches, compared with plain Python lists, one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softhooks.layout.layout import Layout, Placement, text_positions
from softhooks.layout.slot_map import Widened, gaps, widen

PLACEMENTS: tuple[Placement, ...] = ("front", "after_first", "end")
SPARE = "spare"
Batch = tuple[list[list[int]], list[list[int]], list[list[bool]], bool]


@st.composite
def masks(draw: st.DrawFn) -> list[list[int]]:
    """Rows of a batch: padding at the left, at the right, at both sides, or nothing else."""
    columns = draw(st.integers(1, 7))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, columns))
        end = draw(st.integers(start, columns))
        rows.append([int(start <= column < end) for column in range(columns)])
    return rows


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Masks, how many real tokens stand before each slot, which slots are in use, and the side that spare slots go to."""
    rows, slots = draw(masks()), draw(st.integers(1, 5))
    offsets = [draw(st.lists(st.integers(0, sum(row)), min_size=slots, max_size=slots)) for row in rows]
    live = [draw(st.lists(st.booleans(), min_size=slots, max_size=slots)) for _ in rows]
    return rows, offsets, live, draw(st.booleans())


def gap_of(mask: list[int], offset: int) -> int:
    """The column after a slot, found by a search."""
    real = [column for column, bit in enumerate(mask) if bit]
    if not real:
        return len(mask)
    return real[0] if offset == 0 else real[offset - 1] + 1


def slow(mask: list[int], offsets: list[int], live: list[bool], spare_first: bool) -> list[Any]:
    """A row with its slots as a list of columns: ("text", i), ("slot", j) or ("spare", j)."""
    row: list[Any] = []
    for column in range(len(mask) + 1):
        row += [("slot", j) for j, offset in enumerate(offsets) if live[j] and gap_of(mask, offset) == column]
        row += [("text", column)] if column < len(mask) else []
    spare = [(SPARE, slot) for slot, used in enumerate(live) if not used]
    return spare + row if spare_first else row + spare


def widened(batch: Batch) -> tuple[Widened, torch.Tensor, list[list[Any]]]:
    rows, offsets, live, spare_first = batch
    mask = torch.tensor(rows)
    wide = widen(gaps(mask, torch.tensor(offsets)), torch.tensor(live), mask.shape[1], spare_first=spare_first)
    each = zip(rows, offsets, live, strict=True)
    return wide, mask, [slow(row, stands, used, spare_first) for row, stands, used in each]


@given(masks())
def test_positions(rows: list[list[int]]) -> None:
    expected = [[max(sum(row[: column + 1]) - 1, 0) for column in range(len(row))] for row in rows]
    mask = torch.tensor(rows)
    for given_mask in (mask, mask.bool(), mask.float()):
        assert text_positions(given_mask).tolist() == expected
    assert mask.tolist() == rows


@given(batches())
def test_gaps(batch: Batch) -> None:
    rows, offsets, _, _ = batch
    found = gaps(torch.tensor(rows), torch.tensor(offsets)).tolist()
    assert found == [[gap_of(row, offset) for offset in own] for row, own in zip(rows, offsets, strict=True)]


def test_a_slot_stands_right_behind_its_last_token_also_where_a_mask_has_holes() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    assert gaps(mask, torch.tensor([[0, 1, 2]])).tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("placement", PLACEMENTS)
@given(rows=masks())
def test_placements(placement: Placement, rows: list[list[int]]) -> None:
    mask = torch.tensor(rows)
    places = Layout.placed(placement, 2).places(mask, None, None, range(len(rows)))
    for row, offsets, live in zip(rows, places.offsets.tolist(), places.live.tolist(), strict=True):
        assert live == [True, True]
        assert offsets == [{"front": 0, "after_first": 1, "end": sum(row)}[placement]] * 2


@given(batches())
def test_every_column_holds_one_thing(batch: Any) -> None:
    wide, mask, rows = widened(batch)
    assert wide.columns == mask.shape[1] + len(batch[1][0])
    for i, row in enumerate(rows):
        assert len(row) == wide.columns
        assert [row[column] for column in wide.text[i].tolist()] == [("text", t) for t in range(mask.shape[1])]
        for slot, column in enumerate(wide.slots[i].tolist()):
            live = bool(wide.live[i, slot])
            assert row[column] == (("slot" if live else SPARE), slot)
            assert live == batch[2][i][slot]
        assert sorted(wide.text[i].tolist() + wide.slots[i].tolist()) == list(range(wide.columns))


@given(batches())
def test_masks_and_values_are_spread(batch: Any) -> None:
    wide, mask, rows = widened(batch)
    ids = torch.arange(mask.numel()).view_as(mask) + 100
    vectors = torch.stack([ids, -ids], dim=-1)
    spread, seen, spread_vectors = wide.spread(ids, 7), wide.spread_mask(mask), wide.spread(vectors, 0)
    for i, row in enumerate(rows):
        for column, (kind, number) in enumerate(row):
            is_text = kind == "text"
            assert int(spread[i, column]) == (int(ids[i, number]) if is_text else 7)
            assert int(seen[i, column]) == (int(mask[i, number]) if is_text else int(kind == "slot"))
            assert spread_vectors[i, column].tolist() == (vectors[i, number].tolist() if is_text else [0, 0])
    assert wide.spread_mask(mask.bool()).dtype == torch.bool
    assert torch.equal(wide.spread_mask(mask.bool()), seen.bool())


@given(batches())
def test_states_come_back_to_the_text(batch: Any) -> None:
    wide, mask, rows = widened(batch)
    states = torch.arange(mask.shape[0] * wide.columns).view(mask.shape[0], wide.columns, 1)
    own, predicting = wide.own_states(states), wide.predicting_states(states, mask)
    assert own.shape == predicting.shape == (*mask.shape, 1)
    for i, row in enumerate(rows):
        for token in range(mask.shape[1]):
            place = row.index(("text", token))
            assert int(own[i, token]) == int(states[i, place])
            while mask[i, token] and place + 1 < len(row) and row[place + 1][0] == "slot":
                place += 1  # the last slot before the next text token is what predicts it
            assert int(predicting[i, token]) == int(states[i, place])


@given(batches())
def test_positions_of_the_widened_row_ignore_padding(batch: Any) -> None:
    """Real columns are numbered from 0 in order."""
    wide, mask, rows = widened(batch)
    positions = text_positions(wide.spread_mask(mask))
    for i, row in enumerate(rows):
        real = [c for c, (kind, n) in enumerate(row) if kind == "slot" or (kind == "text" and bool(mask[i, n]))]
        assert positions[i, real].tolist() == list(range(len(real)))


@given(batches())
def test_slots_stand_behind_as_many_tokens_as_they_should_and_in_order(batch: Batch) -> None:
    wide, _, _ = widened(batch)
    rows, offsets, live, _ = batch
    for i, row in enumerate(rows):
        places = [(offset, wide.slots[i, j].item()) for j, offset in enumerate(offsets[i]) if live[i][j]]
        for offset, place in places:
            before = [bool(wide.text[i, t] < place) for t, bit in enumerate(row) if bit]
            assert sum(before) == offset
        assert sorted(places, key=lambda pair: pair[0]) == sorted(places)  # those of one gap keep their order


@given(batches(), st.integers(0, 5), st.sampled_from(["left", "right"]))
def test_more_padding_moves_nothing_in_the_text(batch: Batch, extra: int, side: str) -> None:
    """The real columns, slots included, keep their order whatever the padding."""

    def real(one: Batch, shift: int) -> list[list[Any]]:
        wide, mask, rows = widened(one)
        seen = wide.spread_mask(mask)
        return [
            [(kind, n - shift if kind == "text" else n) for c, (kind, n) in enumerate(row) if seen[i, c]]
            for i, row in enumerate(rows)
        ]

    rows, offsets, live, spare_first = batch
    more = [[0] * extra + row if side == "left" else row + [0] * extra for row in rows]
    assert real((more, offsets, live, spare_first), extra if side == "left" else 0) == real(batch, 0)

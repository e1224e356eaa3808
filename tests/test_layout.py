"""Where slots stand, against lists: what Python does with one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softhooks.layout import Placement, Widened, gap_before, text_positions, widen

PLACEMENTS: tuple[Placement, ...] = ("front", "after_first", "end")
PADDING, SPARE = "pad", "spare"


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
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], Placement, bool]:
    """Masks, the slots of each row, a placement, and the side that spare slots go to."""
    rows = draw(masks())
    lengths = draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    return rows, lengths, draw(st.sampled_from(PLACEMENTS)), draw(st.booleans())


def gap_of(mask: list[int], placement: Placement) -> int:
    """The column that a row's slots stand before, found by looking."""
    real = [column for column, bit in enumerate(mask) if bit]
    if placement == "end":
        return real[-1] + 1 if real else 0
    if not real:
        return len(mask)
    return real[0] if placement == "front" else real[0] + 1


def slow(mask: list[int], length: int, slots: int, placement: Placement, spare_first: bool) -> list[Any]:
    """A row with its slots, as a list of what stands in each column: ("text", i), ("slot", j) or ("spare", j)."""
    row: list[Any] = [("text", column) for column in range(len(mask))]
    gap = gap_of(mask, placement)
    row[gap:gap] = [("slot", slot) for slot in range(length)]
    spare = [(SPARE, slot) for slot in range(length, slots)]
    return spare + row if spare_first else row + spare


def widened(batch: tuple[list[list[int]], list[int], Placement, bool]) -> tuple[Widened, torch.Tensor, list[list[Any]]]:
    rows, lengths, placement, spare_first = batch
    mask = torch.tensor(rows)
    slots = max(1, *lengths)
    wide = widen(gap_before(mask, placement), mask.shape[1], torch.tensor(lengths), slots, spare_first=spare_first)
    slow_rows = [slow(row, length, slots, placement, spare_first) for row, length in zip(rows, lengths, strict=True)]
    return wide, mask, slow_rows


@given(masks())
def test_positions(rows: list[list[int]]) -> None:
    expected = [[max(sum(row[: column + 1]) - 1, 0) for column in range(len(row))] for row in rows]
    mask = torch.tensor(rows)
    for given_mask in (mask, mask.bool(), mask.float()):
        assert text_positions(given_mask).tolist() == expected
    assert mask.tolist() == rows


@pytest.mark.parametrize("placement", PLACEMENTS)
@given(rows=masks())
def test_gaps(placement: Placement, rows: list[list[int]]) -> None:
    assert gap_before(torch.tensor(rows), placement).tolist() == [gap_of(row, placement) for row in rows]


@given(batches())
def test_every_column_holds_one_thing(batch: Any) -> None:
    wide, mask, rows = widened(batch)
    assert wide.columns == mask.shape[1] + max(1, *batch[1])
    for i, row in enumerate(rows):
        assert len(row) == wide.columns
        assert [row[column] for column in wide.text[i].tolist()] == [("text", t) for t in range(mask.shape[1])]
        for slot, column in enumerate(wide.slots[i].tolist()):
            live = bool(wide.live[i, slot])
            assert row[column] == (("slot" if live else SPARE), slot)
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
    """What is real is counted from 0 in the order in which it stands."""
    wide, mask, rows = widened(batch)
    positions = text_positions(wide.spread_mask(mask))
    for i, row in enumerate(rows):
        real = [c for c, (kind, n) in enumerate(row) if kind == "slot" or (kind == "text" and bool(mask[i, n]))]
        assert positions[i, real].tolist() == list(range(len(real)))


@given(batches())
def test_slots_stand_together_and_in_order(batch: Any) -> None:
    wide, _, _ = widened(batch)
    rows, lengths, placement, _ = batch
    for i, length in enumerate(lengths):
        places = wide.slots[i, :length].tolist()
        assert places == list(range(places[0], places[0] + length)) if length else places == []
        assert wide.live[i].tolist() == [slot < length for slot in range(max(1, *lengths))]
        if length and any(rows[i]):
            before = [wide.text[i, t] < places[0] for t, bit in enumerate(rows[i]) if bit]
            assert sum(before) == {"front": 0, "after_first": 1, "end": len(before)}[placement]


@given(batches(), st.integers(0, 5), st.sampled_from(["left", "right"]))
def test_more_padding_moves_nothing_in_the_text(batch: Any, extra: int, side: str) -> None:
    """The real columns, slots among them, are in the same order whatever stands around them."""

    def real(one: Any, shift: int) -> list[list[Any]]:
        wide, mask, rows = widened(one)
        seen = wide.spread_mask(mask)
        return [
            [(kind, n - shift if kind == "text" else n) for c, (kind, n) in enumerate(row) if seen[i, c]]
            for i, row in enumerate(rows)
        ]

    rows, lengths, placement, spare_first = batch
    if not all(any(row) for row in rows):
        return  # a row of padding has no place for slots to stand next to
    more = [[0] * extra + row if side == "left" else row + [0] * extra for row in rows]
    padded = (more, lengths, placement, spare_first)
    assert real(padded, extra if side == "left" else 0) == real(batch, 0)

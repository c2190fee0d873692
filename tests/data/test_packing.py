"""Best-fit decreasing: every document once, no row over its capacity, and rows that are full."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.packing import pack_best_fit, packing_efficiency


def _one_at_a_time(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition of best-fit decreasing, document by document; of rows with one room the youngest."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    changed: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[document]
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            row = min(fitting, key=lambda number: (rooms[number], -changed[number]))
        else:
            row = len(rows)
            rows.append([])
            rooms.append(capacity)
            changed.append(0)
        rows[row].append(document)
        rooms[row] -= length
        changed[row] = sum(map(len, rows))
    return rows


@given(st.lists(st.integers(1, 30), max_size=80))
def test_placing_equal_lengths_together_is_placing_them_one_by_one(lengths):
    assert pack_best_fit(np.array(lengths, dtype=np.int64), 30) == _one_at_a_time(lengths, 30)


@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_document_is_in_exactly_one_row_that_holds_it(lengths):
    lengths_N = np.array(lengths, dtype=np.int64)
    rows = pack_best_fit(lengths_N, 50)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(0 < lengths_N[row].sum() <= 50 for row in rows)
    # best fit opens a row only where no other takes the document: any two rows together overflow
    totals = sorted(int(lengths_N[row].sum()) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > 50


def test_the_fullest_row_that_fits_is_taken():
    assert pack_best_fit(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]


def test_instruction_data_fills_rows_to_99_percent():
    """A log-normal of the shape of an instruction set's lengths: median 180, longest 760 tokens."""
    rng = np.random.default_rng(0)
    lengths_N = np.clip(rng.lognormal(5.2, 0.55, size=100_000), 20, 760).astype(np.int64)
    for capacity in (1024, 2048, 8192):
        rows = pack_best_fit(lengths_N, capacity)
        assert packing_efficiency(lengths_N, rows, capacity) >= 0.99


def test_the_result_is_a_function_of_its_input():
    lengths_N = np.random.default_rng(1).integers(1, 100, size=500)
    assert pack_best_fit(lengths_N, 256) == pack_best_fit(lengths_N.copy(), 256)


def test_no_documents_make_no_rows():
    assert pack_best_fit(np.array([], dtype=np.int64), 8) == []
    assert packing_efficiency(np.array([], dtype=np.int64), [], 8) == 1.0

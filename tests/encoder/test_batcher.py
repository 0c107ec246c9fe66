from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from m3cli.encoder.batcher import BALANCE_STEP, batch_rows, pack_batches, pack_rows, plan_windows, split_batch
from m3cli.records import Chunks

LENGTHS = st.lists(st.integers(2, 50), max_size=60).map(lambda lengths: np.array(lengths, np.int64))


def as_chunks(lengths: NDArray[np.int64]) -> Chunks:
    rows = len(lengths)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    numbers = np.zeros(rows, np.int32)
    return Chunks(
        input_ids=np.arange(cu_seqlens[-1], dtype=np.int32),
        cu_seqlens=cu_seqlens,
        document=np.arange(rows),
        chunk_index=numbers,
        num_chunks=numbers + 1,
        char_start=np.zeros(rows, np.int64),
        char_end=np.zeros(rows, np.int64),
        truncated=np.zeros(rows, np.bool_),
        num_repeated=np.zeros(rows, np.int32),
    )


@given(LENGTHS, st.integers(1, 120))
def test_windows_are_runs_within_the_budget(lengths: NDArray[np.int64], budget: int) -> None:
    windows = plan_windows(lengths, max_window_tokens=budget)
    assert [row for start, stop in windows for row in range(start, stop)] == list(range(len(lengths)))
    assert all(lengths[start:stop].sum() <= budget or stop - start == 1 for start, stop in windows)


def test_a_shard_without_budget_is_one_window() -> None:
    assert plan_windows(np.array([3, 4, 5]), max_window_tokens=None) == [(0, 3)]


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 4))
def test_batches_hold_every_row_once_longest_first_within_the_budget(
    lengths: NDArray[np.int64], budget: int, lanes: int
) -> None:
    batches = batch_rows(lengths, max_batch_tokens=budget, lanes=lanes)
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(np.diff(lengths[rows]) <= 0)
    assert all(lengths[batch].sum() <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.integers(2, 300), min_size=200, max_size=400), st.integers(2, 4))
def test_lanes_have_alike_batches_and_the_same_number_of_them(lengths: list[int], lanes: int) -> None:
    tokens = np.array(lengths, np.int64)
    batches = [int(tokens[batch].sum()) for batch in batch_rows(tokens, max_batch_tokens=4096, lanes=lanes)]
    fewest = len(batch_rows(tokens, max_batch_tokens=4096))
    assert len(batches) <= -(-fewest // lanes) * lanes
    assert max(batches) <= sum(batches) / len(batches) + 300 + BALANCE_STEP + 300


def test_equal_lengths_keep_their_order() -> None:
    assert [batch.tolist() for batch in batch_rows(np.array([5, 9, 5, 9]), max_batch_tokens=14)] == [[1], [3, 0], [2]]


@given(LENGTHS.filter(len), st.integers(20, 120))
def test_packed_ids_are_the_rows_own(lengths: NDArray[np.int64], budget: int) -> None:
    chunks = as_chunks(lengths)
    for batch in pack_batches(chunks, start=0, stop=len(lengths), max_batch_tokens=budget):
        for place, row in enumerate(batch.rows):
            mine = batch.input_ids[batch.cu_seqlens[place] : batch.cu_seqlens[place + 1]]
            assert mine.tolist() == list(range(chunks.cu_seqlens[row], chunks.cu_seqlens[row + 1]))
        assert batch.max_seqlen == np.diff(batch.cu_seqlens).max()


@given(LENGTHS.filter(lambda lengths: len(lengths) >= 2))
def test_split_keeps_order_and_content(lengths: NDArray[np.int64]) -> None:
    chunks = as_chunks(lengths)
    batch = pack_rows(chunks, np.arange(len(lengths)))
    first, second = split_batch(batch)
    assert [*first.rows, *second.rows] == batch.rows.tolist()
    assert [*first.input_ids, *second.input_ids] == batch.input_ids.tolist()
    assert first.cu_seqlens[0] == second.cu_seqlens[0] == 0
    assert len(first.rows) >= 1
    assert len(second.rows) >= 1

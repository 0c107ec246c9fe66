"""Single texts to packed batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from m3cli.encoder.batcher import BALANCE_STEP, batch_rows, pack_rows, plan_windows, split_batch
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.texts import pack_texts, tokenise_texts
from m3cli.encoder.tokenizer import load_tokenizer
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
def test_windows_are_ranges_within_the_budget(lengths: NDArray[np.int64], budget: int) -> None:
    windows = plan_windows(lengths, max_window_tokens=budget)
    assert [row for start, stop in windows for row in range(start, stop)] == list(range(len(lengths)))
    assert all(lengths[start:stop].sum() <= budget or stop - start == 1 for start, stop in windows)


def test_a_shard_without_budget_is_one_window() -> None:
    assert plan_windows(np.array([3, 4, 5]), max_window_tokens=None) == [(0, 3)]


@given(LENGTHS, st.integers(1, 1000), st.integers(1, 4))
def test_batches_hold_every_row_once_longest_first_within_the_budget(
    lengths: NDArray[np.int64], budget: int, threads: int
) -> None:
    batches = batch_rows(lengths, max_batch_tokens=budget, threads=threads)
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(np.diff(lengths[rows]) <= 0)
    assert all(lengths[batch].sum() <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.integers(2, 300), min_size=200, max_size=400), st.integers(2, 4))
def test_threads_have_equal_batches_and_the_same_number_of_them(lengths: list[int], threads: int) -> None:
    tokens = np.array(lengths, np.int64)
    batches = [int(tokens[batch].sum()) for batch in batch_rows(tokens, max_batch_tokens=4096, threads=threads)]
    fewest = len(batch_rows(tokens, max_batch_tokens=4096))
    assert len(batches) <= -(-fewest // threads) * threads
    assert max(batches) <= sum(batches) / len(batches) + 300 + BALANCE_STEP + 300


def test_equal_lengths_keep_their_order() -> None:
    assert [batch.tolist() for batch in batch_rows(np.array([5, 9, 5, 9]), max_batch_tokens=14)] == [[1], [3, 0], [2]]


@given(LENGTHS.filter(len), st.integers(20, 120))
def test_packed_ids_are_the_rows_own(lengths: NDArray[np.int64], budget: int) -> None:
    chunks = as_chunks(lengths)
    for rows in batch_rows(lengths, max_batch_tokens=budget):
        batch = pack_rows(chunks, rows)
        for index, row in enumerate(batch.rows):
            ids = batch.input_ids[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]]
            assert ids.tolist() == list(range(chunks.cu_seqlens[row], chunks.cu_seqlens[row + 1]))
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


TEXTS = ["one two three four five six seven", "", "a", "trailing  ", "狐狸 跳过"]


def test_texts_are_cut_as_transformers_cuts_them(tiny_m3: Path) -> None:
    tokenizer = load_tokenizer(read_checkpoint(tiny_m3))
    complete = tokenise_texts(TEXTS, tokenizer, max_length=512)
    assert complete.truncated == 0
    cut = tokenise_texts(TEXTS, tokenizer, max_length=4)
    assert cut.truncated == sum(len(ids) > 4 for ids in complete.input_ids)
    for long, short in zip(complete.input_ids, cut.input_ids, strict=True):
        expected = long if len(long) <= 4 else np.append(long[:3], tokenizer.eos_id)
        assert short.tolist() == expected.tolist()


def test_batches_hold_each_text_once_longest_first(tiny_m3: Path) -> None:
    tokenised = tokenise_texts(TEXTS, load_tokenizer(read_checkpoint(tiny_m3)), max_length=512)
    batches = list(pack_texts(tokenised, max_batch_tokens=8))
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert (np.diff(tokenised.num_tokens[rows]) <= 0).all()
    for batch in batches:
        assert len(batch.rows) == 1 or len(batch.input_ids) <= 8
        for place, row in enumerate(batch.rows.tolist()):
            first, last = batch.cu_seqlens[place : place + 2]
            assert batch.input_ids[first:last].tolist() == tokenised.input_ids[row].tolist()

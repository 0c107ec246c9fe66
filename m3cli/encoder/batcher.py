"""Windows and packed batches of a shard's rows, a function of row lengths and budgets only.

A *window* is a range of consecutive rows whose ColBERT matrices fit in memory together. Rows are sorted by length
inside a window and leave it in corpus order, so the writer only appends. Without ColBERT a shard is one window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Batch, Chunks, concat_ranges

WINDOW_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"ColBERT bytes of a window by device kind; fixed, because the bytes of a folder depend on it"
BALANCE_STEP = 128
"tokens; budgets of equal batches are multiples of it, as batches are padded to one (TOKEN_STEP in model.py)"
BALANCE_TRIES = 32


def plan_windows(num_tokens: NDArray[np.int64], *, max_window_tokens: int | None) -> list[tuple[int, int]]:
    """Return ranges [start, stop) of rows of at most `max_window_tokens`; a longer row is a range of its own."""
    num_rows = len(num_tokens)
    if num_rows == 0:
        return []
    if max_window_tokens is None:
        return [(0, num_rows)]
    ends = np.cumsum(num_tokens)
    windows: list[tuple[int, int]] = []
    start, used = 0, 0
    while start < num_rows:
        stop = max(start + 1, int(np.searchsorted(ends, used + max_window_tokens, side="right")))
        windows.append((start, stop))
        start, used = stop, int(ends[stop - 1])
    return windows


def batch_rows(num_tokens: NDArray[np.int64], *, max_batch_tokens: int, threads: int = 1) -> list[NDArray[np.int64]]:
    """Group rows, longest first, into batches of at most `max_batch_tokens`; a longer row is a batch of its own.

    For several threads, batches have nearly equal token counts, and their number is a multiple of the threads as far as
    rows allow. Otherwise threads would be idle during the last batch.

    Returns:
        row numbers, each exactly once, by descending length; equal lengths keep their order.
    """
    order = np.argsort(-num_tokens, kind="stable")
    lengths = num_tokens[order]
    ranges = plan_windows(lengths, max_window_tokens=max_batch_tokens)
    if threads > 1 and ranges:
        limit = -(-len(ranges) // threads) * threads
        step = max(BALANCE_STEP, max_batch_tokens // BALANCE_TRIES // BALANCE_STEP * BALANCE_STEP)
        min_tokens = -(-int(lengths.sum()) // limit // BALANCE_STEP) * BALANCE_STEP
        for budget in range(min_tokens, max_batch_tokens, step):
            balanced = plan_windows(lengths, max_window_tokens=budget)
            if len(balanced) <= limit:
                ranges = balanced
                break
    return [order[start:stop] for start, stop in ranges]


def lengths_with_mcls(num_tokens: NDArray[np.int64], *, every: int) -> NDArray[np.int64]:
    """Return the token counts of rows after MCLS adds its `<s>`; `every` 0 adds none."""
    if not every:
        return num_tokens
    # The row's own <s> is the one of the first `every` tokens of text.
    return num_tokens + np.maximum(0, (num_tokens - 3) // every)


def fit_length(limit: int, *, every: int) -> int:
    """Return the largest token count of a row that MCLS extends to at most `limit` tokens."""
    length = limit - max(0, (limit - 3) // (every + 1))
    while lengths_with_mcls(np.array([length]), every=every)[0] > limit:
        length -= 1
    return length


def pack_rows(chunks: Chunks, rows: NDArray[np.int64]) -> Batch:
    """Return some rows of a shard as one batch."""
    lengths = chunks.num_tokens[rows]
    cu_seqlens, tokens = concat_ranges(chunks.cu_seqlens[rows], lengths)
    return Batch(
        rows=rows,
        input_ids=chunks.input_ids[tokens].astype(np.int64),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(lengths.max()),
    )


def split_batch(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch of two or more rows into two of nearly equal token counts, in the same order."""
    middle = int(np.searchsorted(batch.cu_seqlens, batch.cu_seqlens[-1] / 2))
    middle = min(max(middle, 1), len(batch.rows) - 1)
    return slice_batch(batch, 0, middle), slice_batch(batch, middle, len(batch.rows))


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Return the rows [start, stop) of a batch."""
    cu_seqlens = batch.cu_seqlens[start : stop + 1]
    return Batch(
        rows=batch.rows[start:stop],
        input_ids=batch.input_ids[cu_seqlens[0] : cu_seqlens[-1]],
        cu_seqlens=cu_seqlens - cu_seqlens[0],
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )

"""Rows of a shard to windows and packed batches: a function of row lengths and budgets, nothing else.

A *window* is a run of consecutive rows whose ColBERT matrices fit in memory together; rows are sorted by length inside
a window and come out of it in corpus order, so the writer only ever appends. Without ColBERT a shard is one window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from m3cli.records import Batch, Chunks

WINDOW_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"ColBERT bytes of a window by device kind; fixed, because the bytes of a folder depend on it as on max_batch_tokens"
BALANCE_STEP = 128
"tokens; sizes of alike batches are multiples of it, as batches are filled up to one (TOKEN_STEP in model.py)"
BALANCE_TRIES = 32


def plan_windows(num_tokens: NDArray[np.int64], *, max_window_tokens: int | None) -> list[tuple[int, int]]:
    """Cut rows into runs [start, stop) of at most `max_window_tokens`; a longer row is a run of its own."""
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


def batch_rows(num_tokens: NDArray[np.int64], *, max_batch_tokens: int, lanes: int = 1) -> list[NDArray[np.int64]]:
    """Group rows, longest first, into batches of at most `max_batch_tokens`; a longer row is a batch of its own.

    For several lanes batches are made alike, and as many as each lane can have the same number of, as far as rows
    allow: a last one of a few tokens, or one too many, would leave lanes idle while another one ends.

    Returns:
        row numbers, each exactly once; inside a batch and from batch to batch lengths never grow, equal lengths keep
        their order.
    """
    order = np.argsort(-num_tokens, kind="stable")
    lengths = num_tokens[order]
    runs = plan_windows(lengths, max_window_tokens=max_batch_tokens)
    if lanes > 1 and runs:
        most = -(-len(runs) // lanes) * lanes
        step = max(BALANCE_STEP, max_batch_tokens // BALANCE_TRIES // BALANCE_STEP * BALANCE_STEP)
        least_tokens = -(-int(lengths.sum()) // most // BALANCE_STEP) * BALANCE_STEP
        for budget in range(least_tokens, max_batch_tokens, step):
            alike = plan_windows(lengths, max_window_tokens=budget)
            if len(alike) <= most:
                runs = alike
                break
    return [order[start:stop] for start, stop in runs]


def lengths_with_mcls(num_tokens: NDArray[np.int64], *, every: int) -> NDArray[np.int64]:
    """Return the tokens that rows of `num_tokens` have with those that are added; `every` 0 adds none."""
    if not every:
        return num_tokens
    # Of the text between <s> and </s>, `every` tokens have the row's own <s>.
    return num_tokens + np.maximum(0, (num_tokens - 3) // every)


def fit_length(limit: int, *, every: int) -> int:
    """Return the most tokens that a row may have so that with those added it has at most `limit`."""
    length = limit - max(0, (limit - 3) // (every + 1))
    while lengths_with_mcls(np.array([length]), every=every)[0] > limit:
        length -= 1
    return length


def pack_batches(chunks: Chunks, *, start: int, stop: int, max_batch_tokens: int) -> Iterator[Batch]:
    """Yield the rows [start, stop) of a shard as packed batches, longest first."""
    num_tokens = chunks.num_tokens[start:stop]
    for rows in batch_rows(num_tokens, max_batch_tokens=max_batch_tokens):
        yield pack_rows(chunks, rows + start)


def pack_rows(chunks: Chunks, rows: NDArray[np.int64]) -> Batch:
    """Copy some rows of a shard one after the other."""
    begins = chunks.cu_seqlens[rows]
    lengths = chunks.cu_seqlens[rows + 1] - begins
    cu_seqlens = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    # Token i of the batch stands at begins[row] + (i - cu_seqlens[row]) of the shard.
    take = np.arange(cu_seqlens[-1]) + np.repeat(begins - cu_seqlens[:-1], lengths)
    return Batch(
        rows=rows,
        input_ids=chunks.input_ids[take].astype(np.int64),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(lengths.max()),
    )


def split_batch(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch of two or more rows in two of nearly equal token counts, order kept."""
    middle = int(np.searchsorted(batch.cu_seqlens, batch.cu_seqlens[-1] / 2))
    middle = min(max(middle, 1), len(batch.rows) - 1)
    return _slice_batch(batch, 0, middle), _slice_batch(batch, middle, len(batch.rows))


def _slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    cu_seqlens = batch.cu_seqlens[start : stop + 1]
    return Batch(
        rows=batch.rows[start:stop],
        input_ids=batch.input_ids[cu_seqlens[0] : cu_seqlens[-1]],
        cu_seqlens=cu_seqlens - cu_seqlens[0],
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )

"""Documents whose merged matrix would be too large, and the lengths that --mcls leaves."""

from __future__ import annotations

import numpy as np

from m3cli.jobs.stages import TOO_LARGE, find_oversized
from m3cli.records import Chunks


def make_chunks(rows_of: list[int]) -> Chunks:
    """Documents of so many chunks, each of 10 tokens, 8 of them text."""
    num_rows = sum(rows_of)
    return Chunks(
        input_ids=np.zeros(num_rows * 10, np.int32),
        cu_seqlens=np.arange(num_rows + 1) * 10,
        document=np.repeat(np.arange(len(rows_of)), rows_of),
        chunk_index=np.concatenate([np.arange(count) for count in rows_of]).astype(np.int32),
        num_chunks=np.repeat(rows_of, rows_of).astype(np.int32),
        char_start=np.arange(num_rows),
        char_end=np.arange(num_rows) + 1,
        truncated=np.zeros(num_rows, np.bool_),
        num_repeated=np.zeros(num_rows, np.int32),
    )


def test_a_document_of_more_tokens_than_its_matrix_may_have_is_found_by_its_first_row() -> None:
    chunks = make_chunks([1, 5, 2, 6])
    found = list(find_oversized(chunks, max_tokens=41))
    assert [(fault.row, fault.reason) for fault in found] == [(1, TOO_LARGE), (8, TOO_LARGE)]
    assert "42 tokens" in found[0].detail
    assert "--colbert-top-k" in found[0].detail


def test_without_a_limit_nothing_is_too_large() -> None:
    chunks = make_chunks([1, 5])
    assert not list(find_oversized(chunks, max_tokens=None))
    assert not list(find_oversized(chunks, max_tokens=42))

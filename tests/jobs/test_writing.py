"""Documents whose merged matrix would be too large, and the lengths that --mcls leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from m3cli.config import ColbertForm
from m3cli.encoder.encode import FailedRow
from m3cli.jobs.encode.lifecycle import TOO_LARGE
from m3cli.jobs.encode.pipeline import MatrixLimit, find_oversized
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


@pytest.fixture
def parquet_of_410_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3cli.jobs.encode.pipeline.MAX_MATRIX_BYTES", 410)


def find(chunks: Chunks, **form: Any) -> list[FailedRow]:
    return list(find_oversized(chunks, MatrixLimit(form=ColbertForm(**form), vector_bytes=10)))


@pytest.mark.usefixtures("parquet_of_410_bytes")
def test_a_document_whose_matrix_is_too_large_is_found_by_its_first_row() -> None:
    found = find(make_chunks([1, 5, 2, 6]))
    assert [(fault.row, fault.reason) for fault in found] == [(8, TOO_LARGE)]
    assert (
        "its 50 tokens make a ColBERT matrix of 490 bytes, and Parquet holds 410; use --format npy" in found[0].detail
    )


@pytest.mark.usefixtures("parquet_of_410_bytes")
def test_what_is_stored_counts() -> None:
    chunks = make_chunks([6])
    assert find(chunks, top_k=42)
    assert find(chunks, top_k=10**9)
    assert not find(chunks, top_k=41)
    assert not find(chunks, pool=2)


def test_without_a_limit_nothing_is_too_large() -> None:
    assert not list(find_oversized(make_chunks([1, 5]), None))

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from m3cli.encoder.encode import FailedRow
from m3cli.jobs.encode import pipeline as module
from m3cli.jobs.encode.pipeline import TokenisedShard, drop_documents, encode_windows, find_originals
from m3cli.progress import Stopwatch
from m3cli.records import Batch, Chunks, Document, Embeddings, Origins, Shard, ShardText, SkippedRow


def make_shard(texts: list[str], rows_of: list[int]) -> TokenisedShard:
    """A shard whose document n has rows_of[n] rows, the row r of all with r + 2 tokens."""
    documents = tuple(
        Document(id=text, text=text, text_hash=(len(text), 0), has_own_id=n > 0, position=10 * n)
        for n, text in enumerate(texts)
    )
    early = SkippedRow(source="s", position=15, byte_offset=15, id=None, reason="empty text", detail="", row=b"")
    num_rows = sum(rows_of)
    lengths = np.arange(num_rows) + 2
    return TokenisedShard(
        text=ShardText(
            shard=Shard(index=1, source=0, start=0, stop=99),
            documents=documents,
            kept=None,
            skipped=(early,),
            input_hash="",
        ),
        chunks=Chunks(
            input_ids=np.repeat(np.arange(num_rows), lengths).astype(np.int32),
            cu_seqlens=np.concatenate(([0], np.cumsum(lengths))),
            document=np.repeat(np.arange(len(texts)), rows_of),
            chunk_index=np.concatenate([np.arange(count) for count in rows_of]).astype(np.int32),
            num_chunks=np.repeat(rows_of, rows_of).astype(np.int32),
            char_start=np.arange(num_rows),
            char_end=np.arange(num_rows) + 1,
            truncated=np.zeros(num_rows, np.bool_),
            num_repeated=np.zeros(num_rows, np.int32),
        ),
        origins=Origins(rows=np.array([0, 4]), shard=np.array([7, 8]), row=np.array([70, 80])),
    )


def test_batches_of_all_windows_are_one_sequence_and_reused_rows_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard(["a", "bb", "ccc", "dddd"], [1, 3, 1, 2])  # rows 0 and 4 are reused
    monkeypatch.setattr(module, "window_tokens", lambda *_: 10)  # rows 0 to 2, 3, 4, 5, 6
    events: list[str] = []

    def encode_all(batches: Iterator[Batch]) -> Iterator[Embeddings | FailedRow]:
        for batch in list(batches):
            events.append(f"encode {batch.rows.tolist()}")
            yield as_embeddings(batch.rows)

    def read(_: object, *, start: int, stop: int) -> Iterator[Embeddings]:
        rows = np.array([row for row in (0, 4) if start <= row < stop])
        if len(rows):
            events.append(f"read {rows.tolist()}")
            yield as_embeddings(rows)

    pipeline: Any = SimpleNamespace(
        encoder=SimpleNamespace(encode_all=encode_all, mcls=0, max_tokens=None, num_threads=1, model=None),
        previous=SimpleNamespace(read=read),
        config=SimpleNamespace(dedupe=False, outputs=()),
        run=SimpleNamespace(runtime=SimpleNamespace(max_batch_tokens=100)),
        watch=Stopwatch(),
    )
    result = [
        (window.start, window.stop, made.rows.tolist())
        for window, made in encode_windows(shard, pipeline)
        if isinstance(made, Embeddings)
    ]
    assert result == [(0, 3, [0]), (0, 3, [2, 1]), (3, 4, [3]), (4, 5, [4]), (5, 6, [5]), (6, 7, [6])]
    assert events == [
        "encode [2, 1]",
        "read [0]",
        "encode [3]",
        "encode [5]",
        "read [4]",
        "encode [6]",
    ]


def as_embeddings(rows: np.ndarray) -> Embeddings:
    return Embeddings(rows=rows, dense_vecs=None, lexical_weights=None, colbert_vecs=None)


def test_a_document_is_dropped_with_all_its_rows() -> None:
    shard = make_shard(["a", "bb", "ccc", "dddd"], [1, 3, 1, 2])
    left = drop_documents(
        shard,
        [FailedRow(row=2, reason="out of memory", detail="first"), FailedRow(row=3, reason="other", detail="second")],
        source="s",
    )
    assert [document.id for document in left.text.documents] == ["a", "ccc", "dddd"]
    assert left.chunks.document.tolist() == [0, 1, 2, 2]
    assert left.chunks.num_tokens.tolist() == [2, 6, 7, 8]
    assert left.chunks.input_ids.tolist() == np.repeat([0, 4, 5, 6], [2, 6, 7, 8]).tolist()
    assert left.chunks.char_start.tolist() == [0, 4, 5, 6]
    assert left.origins.rows.tolist() == [0, 1]
    assert left.num_reused == 2
    assert [(row.position, row.reason, row.detail) for row in left.text.skipped] == [
        (10, "out of memory", "first"),
        (15, "empty text", ""),
    ]
    assert left.text.skipped[0].id == "bb"


def test_the_original_of_a_row_is_the_first_of_its_text_and_place() -> None:
    shard = make_shard(["aa", "b", "cc", "dd"], [2, 1, 2, 2])
    assert find_originals(shard, np.arange(7)).tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert find_originals(shard, np.array([2, 3, 4, 6])).tolist() == [2, 3, 4, 4]
    assert find_originals(shard, np.arange(0)).tolist() == []

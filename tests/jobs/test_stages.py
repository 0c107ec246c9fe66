from __future__ import annotations

import numpy as np

from m3cli.encoder.encode import FailedRow
from m3cli.jobs.encode.pipeline import TokenisedShard, drop_documents, find_originals
from m3cli.records import Chunks, Document, Origins, Shard, ShardText, SkippedRow


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

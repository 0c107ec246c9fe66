"""The scalar columns of a run of rows, from the shard's documents and chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from m3cli.records import Chunks, ShardText
from m3cli.store.layout import TEXT_COLUMN, RowForm


def build_rows(form: RowForm, *, text: ShardText, chunks: Chunks, start: int, stop: int) -> pa.Table:
    """Build rows [start, stop) of a shard, without vectors, in the order of `row_schema`."""
    run = slice(start, stop)
    places = chunks.document[run]
    documents = [text.documents[place] for place in places.tolist()]
    columns: dict[str, Any] = {
        "id": pa.array([document.id for document in documents], pa.string()),
        "chunk_index": pa.array(chunks.chunk_index[run], pa.int32()),
        "num_chunks": pa.array(chunks.num_chunks[run], pa.int32()),
        "char_start": pa.array(chunks.char_start[run], pa.int64()),
        "char_end": pa.array(chunks.char_end[run], pa.int64()),
        "num_tokens": pa.array(np.diff(chunks.cu_seqlens[start : stop + 1]).astype(np.int32)),
        "truncated": pa.array(chunks.truncated[run], pa.bool_()),
    }
    if form.kept is not None:
        columns |= _kept_columns(form.kept, text=text, places=places)
    if form.keep_text:
        spans = zip(documents, chunks.char_start[run].tolist(), chunks.char_end[run].tolist(), strict=True)
        columns[TEXT_COLUMN] = pa.array([document.text[first:last] for document, first, last in spans], pa.string())
    return pa.table(columns)


def _kept_columns(kept: pa.Schema, *, text: ShardText, places: Any) -> dict[str, Any]:
    if text.kept is None or text.kept.num_rows != len(text.documents):
        raise ValueError("kept fields must be a table with one row a document")
    indices = pa.array(places, pa.int64())
    taken = {name: text.kept.column(name).take(indices) for name in kept.names}
    for field in kept:
        if taken[field.name].type != field.type:
            raise ValueError(f"kept field {field.name!r} is {taken[field.name].type}, the folder has {field.type}")
    return taken

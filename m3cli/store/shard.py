"""Write a shard, window by window, into the worker's tmp folder; `RunFolder.commit` publishes it.

A window is a slice of consecutive rows. Rows are known before the first window, and so is the number of vectors unless
tokens are selected, pooled or merged. Every file is written once from start to end, except the header of npy files
of an unknown number of vectors. Memory is bounded by a window and a row group. Equal rows and vectors give equal bytes,
whatever the windows: no time, host or path is in a file.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import orjson
import pyarrow as pa

from m3cli.records import Chunks, DoneEntry, Embeddings, ShardCounts, ShardText, SkippedRow
from m3cli.store.commit import StagedFile
from m3cli.store.layout import (
    RowForm,
    colbert_name,
    dense_name,
    hashes_name,
    indptr_name,
    lexical_name,
    rows_name,
    scales_name,
    skipped_name,
)
from m3cli.store.npy import ColbertFiles, DenseFile, LexicalFile, write_hashes
from m3cli.store.parquet import RowsFile, build_rows

SKIPPED_ROW_BYTES = 64 << 10


class _Part(Protocol):
    def append(self, rows: pa.Table, embeddings: Embeddings) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


class ShardWriter:
    """Open files of a shard; they are deleted unless `finish` is called."""

    def __init__(self, staging: Path, *, form: RowForm, text: ShardText, chunks: Chunks, source: str) -> None:
        self._staging = staging
        self._form = form
        self._text = text
        self._chunks = chunks
        self._source = source
        self._next_row = 0
        self._staged: list[StagedFile] = []
        self._parts: list[_Part] = []
        try:
            self._open_parts()
        except BaseException:
            self.discard()
            raise

    def _open_parts(self) -> None:
        form, index, rows = self._form, self._text.shard.index, self._chunks.num_rows
        self._parts.append(RowsFile(self._stage(rows_name(index)), form))
        if form.format != "npy":
            return
        if "dense" in form.outputs:
            staged = self._stage(dense_name(index))
            self._parts.append(DenseFile(staged, rows=rows, dim=form.dim, dtype=form.dense_dtype))
        if "sparse" in form.outputs:
            self._parts.append(LexicalFile(self._stage(lexical_name(index)), vocabulary=form.vocabulary))
        if "colbert" in form.outputs:
            vectors, indptr = self._stage(colbert_name(index)), self._stage(indptr_name(index))
            scales = self._stage(scales_name(index)) if form.scaled else None
            num_vectors = _count_vectors(self._chunks) if form.exact_vectors else None
            self._parts.append(ColbertFiles(vectors, indptr, scales, form=form, rows=rows, num_vectors=num_vectors))

    def _stage(self, name: str) -> StagedFile:
        staged = StagedFile(self._staging, name)
        self._staged.append(staged)
        return staged

    def append(self, embeddings: Embeddings) -> None:
        """Append a window: the embeddings of the next rows."""
        start, stop = self._next_row, self._next_row + len(embeddings.rows)
        if embeddings.rows.tolist() != list(range(start, stop)):
            raise ValueError(f"a window must start at row {start} and have consecutive rows")
        _check_outputs(self._form, embeddings)
        if start == stop:
            return
        rows = build_rows(self._form, text=self._text, chunks=self._chunks, start=start, stop=stop)
        for part in self._parts:
            part.append(rows, embeddings)
        self._next_row = stop

    def finish(self) -> DoneEntry:
        """Complete the files and make their bytes durable; return the entry for `RunFolder.commit`."""
        if self._next_row != self._chunks.num_rows:
            raise ValueError(f"{self._chunks.num_rows} rows were planned, {self._next_row} appended")
        for part in self._parts:
            part.finish()
        index, text, chunks = self._text.shard.index, self._text, self._chunks
        write_hashes(self._stage(hashes_name(index)), text.documents)
        if text.skipped:
            self._stage(skipped_name(index)).write(b"".join(map(_skipped_line, text.skipped)))
        entry = DoneEntry(
            shard=text.shard,
            source=self._source,
            input_hash=text.input_hash,
            counts=ShardCounts(
                documents=len(text.documents),
                chunks=chunks.num_rows,
                tokens=int(chunks.num_tokens[chunks.chunk_index >= 0].sum()),
                skipped=len(text.skipped),
                truncated=int(chunks.truncated.sum()),
                missing_ids=sum(not document.has_own_id for document in text.documents),
            ),
            files=tuple(staged.seal() for staged in self._staged),
        )
        self._staged, self._parts = [], []
        return entry

    def discard(self) -> None:
        """Close and delete the files; do nothing after `finish`."""
        for part in self._parts:
            part.discard()
        for staged in self._staged:
            staged.discard()
        self._staged, self._parts = [], []

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Discard the shard unless it is finished."""
        self.discard()


def _count_vectors(chunks: Chunks) -> int:
    """Return the number of ColBERT vectors: one per token except `<s>`, none for documents' own rows."""
    return int((chunks.num_tokens - 1)[chunks.chunk_index >= 0].sum())


def _check_outputs(form: RowForm, embeddings: Embeddings) -> None:
    values = {
        "dense": embeddings.dense_vecs,
        "sparse": embeddings.lexical_weights,
        "colbert": embeddings.colbert_vecs,
    }
    if {name for name, value in values.items() if value is not None} != set(form.outputs):
        raise ValueError(f"a window must carry exactly the outputs {', '.join(form.outputs)}")


def _skipped_line(skipped: SkippedRow) -> bytes:
    line: dict[str, Any] = {
        "source": skipped.source,
        "position": skipped.position,
        "byte_offset": skipped.byte_offset,
        "id": None if skipped.id is None else _printable(skipped.id),
        "reason": skipped.reason,
        "detail": _printable(skipped.detail),
        "row": skipped.row[:SKIPPED_ROW_BYTES].decode("utf-8", errors="backslashreplace"),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _printable(text: str) -> str:
    # A lone surrogate, which may be why the row is skipped, has no UTF-8 form.
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")

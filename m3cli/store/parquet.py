"""Write `rows/*.parquet` in row groups of about 64 MiB of values, independent of the windows.

A row group ends before the row that would take its vectors, text and kept fields over ROW_GROUP_BYTES. The end of a
window is therefore copied and kept for the next one; at most one row group is in memory. Vectors get no dictionary and
no statistics, and are compressed only on request (rates: scripts/bench_results/LOG.md). Other columns are zstd.

`DensePages` reads dense vectors directly from the pages of a row group. Arrow assembles a fixed-size list value by
value, which is slow. A page of lists without nulls is a few bytes of levels followed by the values, so the values can
be copied. Any other page, also a damaged one, is left to Arrow's reader. Page headers are structs of Thrift's compact
protocol (`parquet.thrift`: PageHeader).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.records import Chunks, Embeddings, LexicalWeights, ShardText
from m3cli.store.commit import StagedFile, output_errors
from m3cli.store.layout import (
    MAX_MATRIX_BYTES,
    ROW_COLUMNS,
    SCALE_BYTES,
    SCALES_COLUMN,
    TEXT_COLUMN,
    VECTOR_COLUMNS,
    RowForm,
    row_schema,
    vector_layout,
)

ROW_GROUP_BYTES = 64 << 20
ROW_OVERHEAD = 64
"bytes added for each row, so that a row group of small rows ends too"
ROWS_PER_BATCH = 4
"rows after which the writer checks the page size (1 MiB); the default of 1,024 rows can be a GiB of ColBERT vectors"


class RowsFile:
    """Open `rows/*.parquet`."""

    def __init__(self, staged: StagedFile, form: RowForm) -> None:
        self._staged = staged
        self._form = form
        self._schema = row_schema(form)
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self._writer = pq.ParquetWriter(staged, self._schema, **_column_options(form))

    def append(self, rows: pa.Table, embeddings: Embeddings) -> None:
        """Append the rows of a window."""
        sizes = np.concatenate([[0], np.cumsum(_row_bytes(rows, embeddings, form=self._form))])
        first, num_rows = 0, rows.num_rows
        while first < num_rows:
            free = ROW_GROUP_BYTES - self._pending_bytes
            last = int(np.searchsorted(sizes, sizes[first] + free, side="right")) - 1
            last = max(last, first if self._pending else first + 1)  # a row may be larger than a row group
            piece = self._piece(rows, embeddings, first, last)
            if last == num_rows:
                self._keep(piece, int(sizes[last] - sizes[first]))
            else:
                self._write_group(piece)
            first = last

    def _piece(self, rows: pa.Table, embeddings: Embeddings, first: int, last: int) -> pa.Table:
        table = rows.slice(first, last - first)
        if self._form.format == "parquet":
            for name, column in vector_columns(embeddings, self._form, first, last).items():
                table = table.append_column(name, column)
        return table.cast(self._schema)

    def _keep(self, piece: pa.Table, size: int) -> None:
        # Copied, because a slice would keep the complete window in memory.
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, piece.schema) as stream:
            stream.write_table(piece)
        self._pending.append(pa.ipc.open_stream(buffer.getvalue()).read_all())
        self._pending_bytes += size

    def _write_group(self, piece: pa.Table) -> None:
        group = pa.concat_tables([*self._pending, piece])
        self._pending, self._pending_bytes = [], 0
        # In one piece: pages end where arrays end, so the file would depend on the windows.
        group = group.combine_chunks()
        if group.num_rows:
            with output_errors(self._staged.path):
                self._writer.write_table(group, row_group_size=group.num_rows)

    def finish(self) -> None:
        """Write the pending rows and the footer."""
        self._write_group(self._schema.empty_table())
        with output_errors(self._staged.path):
            self._writer.close()

    def discard(self) -> None:
        """Close the writer without writing."""
        self._staged.mute()
        self._writer.close()


def _row_bytes(rows: pa.Table, embeddings: Embeddings, *, form: RowForm) -> NDArray[np.int64]:
    sizes = np.full(len(embeddings.rows), ROW_OVERHEAD, dtype=np.int64)
    for name in rows.column_names:
        if name == "id" or name not in dict(ROW_COLUMNS):
            sizes += _value_bytes(rows.column(name).combine_chunks())
    if form.format != "parquet":
        return sizes
    if embeddings.dense_vecs is not None:
        sizes += form.dim * (4 if form.dense_dtype == "float32" else 2)
    if embeddings.lexical_weights is not None:
        sizes += np.diff(embeddings.lexical_weights.indptr) * 8
    if embeddings.colbert_vecs is not None:
        vector = form.vector_bytes + (SCALE_BYTES if form.scaled else 0)
        sizes += np.diff(embeddings.colbert_vecs.indptr) * vector
    return sizes


def _value_bytes(values: pa.Array) -> NDArray[np.int64]:
    """Return the bytes of each value [R] of any type, without offsets and nulls."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    sizes: NDArray[np.int64] = np.zeros(len(values), np.int64)
    if pa.types.is_struct(kind):
        sizes = sum(map(_value_bytes, values.flatten()), start=sizes)
    elif pa.types.is_fixed_size_list(kind):
        items = values.values.slice(values.offset * kind.list_size, len(values) * kind.list_size)
        sizes = _value_bytes(items).reshape(len(values), kind.list_size).sum(axis=1)
    elif pa.types.is_nested(kind):  # lists and maps
        ends = np.concatenate([[0], np.cumsum(_value_bytes(values.values))])
        sizes = np.diff(ends[values.offsets.to_numpy()])
    elif pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
        sizes += kind.bit_width // 8
    elif not pa.types.is_null(kind):
        text = values.cast(pa.large_binary()) if kind in (pa.string_view(), pa.binary_view()) else values
        sizes = pc.binary_length(text).fill_null(0).to_numpy().astype(np.int64)
    return sizes


def vector_columns(embeddings: Embeddings, form: RowForm, first: int, last: int) -> dict[str, pa.Array]:
    """Return the vectors of rows [first, last) as columns of `row_schema`."""
    columns = {}
    if embeddings.dense_vecs is not None:
        flat = embeddings.dense_vecs[first:last].astype(form.dense_dtype, order="C", copy=False).reshape(-1)
        columns["dense_vecs"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), form.dim)
    if embeddings.lexical_weights is not None:
        columns["lexical_weights"] = _lexical_column(embeddings.lexical_weights, first, last)
    if embeddings.colbert_vecs is not None:
        matrices = embeddings.colbert_vecs
        columns["colbert_vecs"] = _blobs(matrices.vectors, matrices.indptr[first : last + 1], vector_layout(form)[0])
        if form.scaled:
            assert matrices.scales is not None
            columns[SCALES_COLUMN] = _blobs(matrices.scales, matrices.indptr[first : last + 1], "float32")
    return columns


def _lexical_column(weights: LexicalWeights, first: int, last: int) -> pa.Array:
    begin, end = int(weights.indptr[first]), int(weights.indptr[last])
    # int32 is enough: a row group ends long before 2^31 weights.
    offsets = pa.array((weights.indptr[first : last + 1] - begin).astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(weights.indices[begin:end], pa.uint32())),
        pa.ListArray.from_arrays(offsets, pa.array(weights.values[begin:end], pa.float32())),
    ]
    return pa.StructArray.from_arrays(lists, names=["indices", "values"])


def _blobs(values: NDArray[Any], indptr: NDArray[np.int64], dtype: str) -> pa.Array:
    """Return a binary value per row; row i is `values[indptr[i] : indptr[i + 1]]`."""
    plain = values[indptr[0] : indptr[-1]].astype(np.dtype(dtype).newbyteorder("<"), order="C", copy=False)
    offsets = (indptr - indptr[0]) * int(np.prod(plain.shape[1:]) * plain.itemsize)
    if len(offsets) > 1 and int(np.diff(offsets).max()) > MAX_MATRIX_BYTES:
        raise ValueError("a ColBERT matrix of 2^31 bytes or more cannot be a Parquet value; skip the row")
    buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(plain)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(indptr) - 1, buffers)


@lru_cache(maxsize=8)  # ParquetFile.schema is a cycle of 28 KB, and the garbage collector runs seldom
def _column_options(form: RowForm) -> dict[str, Any]:
    """Return compression, dictionary and statistics for each column, by Parquet's leaf names."""
    schema, empty = row_schema(form), pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    leaves = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    paths = [leaves.column(leaf).path for leaf in range(len(leaves))]
    vectors = (*VECTOR_COLUMNS.values(), SCALES_COLUMN)
    scalars = [path for path in paths if path.split(".")[0] not in vectors]
    repeating = [path for path in scalars if path not in ("id", TEXT_COLUMN)]
    return {
        "compression": dict.fromkeys(paths if form.compression == "zstd" else scalars, "zstd"),
        "use_dictionary": repeating,
        "write_statistics": [path for path in scalars if path != TEXT_COLUMN],
        "write_batch_size": ROWS_PER_BATCH if "colbert_vecs" in schema.names else None,
        "store_schema": True,
    }


def build_rows(form: RowForm, *, text: ShardText, chunks: Chunks, start: int, stop: int) -> pa.Table:
    """Build rows [start, stop) of a shard, without vectors, in the order of `row_schema`."""
    window = slice(start, stop)
    owners = chunks.document[window]
    documents = [text.documents[owner] for owner in owners.tolist()]
    columns: dict[str, Any] = {
        "id": pa.array([document.id for document in documents], pa.string()),
        "chunk_index": pa.array(chunks.chunk_index[window], pa.int32()),
        "num_chunks": pa.array(chunks.num_chunks[window], pa.int32()),
        "char_start": pa.array(chunks.char_start[window], pa.int64()),
        "char_end": pa.array(chunks.char_end[window], pa.int64()),
        "num_tokens": pa.array(np.diff(chunks.cu_seqlens[start : stop + 1]).astype(np.int32)),
        "truncated": pa.array(chunks.truncated[window], pa.bool_()),
    }
    if form.kept is not None:
        columns |= _kept_columns(form.kept, text=text, owners=owners)
    if form.keep_text:
        spans = zip(documents, chunks.char_start[window].tolist(), chunks.char_end[window].tolist(), strict=True)
        columns[TEXT_COLUMN] = pa.array([document.text[first:last] for document, first, last in spans], pa.string())
    return pa.table(columns)


def _kept_columns(kept: pa.Schema, *, text: ShardText, owners: Any) -> dict[str, Any]:
    if text.kept is None or text.kept.num_rows != len(text.documents):
        raise ValueError("kept fields must be a table with one row per document")
    indices = pa.array(owners, pa.int64())
    taken = {name: text.kept.column(name).take(indices) for name in kept.names}
    for field in kept:
        if taken[field.name].type != field.type:
            raise ValueError(f"kept field {field.name!r} is {taken[field.name].type}, the folder has {field.type}")
    return taken


# Thrift's compact types, and the fields and values of PageHeader and DataPageHeader
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_KIND, _FULL_SIZE, _SIZE, _DATA_PAGE = 1, 2, 3, 5
_NUM_VALUES, _ENCODING = 1, 2
_PLAIN = 0
_DEPTH = 2
"of nested structs in a PageHeader: DataPageHeader and its Statistics"
_INTEGER_BITS = 64
_LEVEL_SIZE = 4
"bytes that hold the length of the repetition and of the definition levels"


class DensePages:
    """Pages of the dense column of an open Parquet file."""

    def __init__(self, file: pq.ParquetFile, path: Path) -> None:
        self._metadata = file.metadata
        self._content: NDArray[np.uint8] = np.memmap(path, np.uint8, "r").view(np.ndarray)
        kind = file.schema_arrow.field(VECTOR_COLUMNS["dense"]).type
        self._dim: int = kind.list_size
        self._dtype = np.dtype("<f2" if kind.value_type == pa.float16() else "<f4")

    def read(self, group: int) -> NDArray[np.floating] | None:
        """Return the vectors [R, dim] of a row group; None if its pages are not plain values."""
        columns = self._metadata.row_group(group)
        chunks = map(columns.column, range(columns.num_columns))
        column = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == VECTOR_COLUMNS["dense"])
        first, length = column.data_page_offset, column.total_compressed_size
        codec = None if column.compression == "UNCOMPRESSED" else pa.Codec(column.compression.lower())
        filled = 0
        try:
            values = np.empty(column.num_values * self._dtype.itemsize, np.uint8)
            for page in _iter_values(self._content[first : first + length], codec, self._dtype.itemsize):
                values[filled : filled + len(page)] = page
                filled += len(page)
        except (IndexError, KeyError, TypeError, ValueError, MemoryError, OSError, pa.ArrowException):
            return None
        return values.view(self._dtype).reshape(-1, self._dim) if filled == len(values) else None


def _iter_values(pages: NDArray[np.uint8], codec: pa.Codec | None, size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of each page's values, `size` bytes each; an unknown page raises one of several exceptions."""
    position = 0
    while position < len(pages):
        header, position = _read_struct(pages, position)
        if header[_KIND] != 0 or header[_DATA_PAGE][_ENCODING] != _PLAIN:
            raise ValueError("not a plain data page")
        page = pages[position : position + max(header[_SIZE], 0)]
        position += len(page)
        if codec is not None:
            page = np.frombuffer(codec.decompress(page, header[_FULL_SIZE]), np.uint8)
        if len(page) != header[_FULL_SIZE]:
            raise ValueError("the file ends within a page")
        begin = 0
        for _ in ("repetition", "definition"):
            begin += _LEVEL_SIZE + int(page[begin : begin + _LEVEL_SIZE].view("<u4")[0])
        if len(page) - begin != header[_DATA_PAGE][_NUM_VALUES] * size:
            raise ValueError("a value is missing")
        yield page[begin:]


def _read_struct(content: NDArray[np.uint8], position: int, *, depth: int = _DEPTH) -> tuple[dict[int, Any], int]:
    """Return the fields of a Thrift struct by number, and the position after it."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := int(content[position])) != _STOP:
        position += 1
        step, kind = head >> 4, head & 15
        if step:
            number += step
        else:
            number, position = _read_integer(content, position)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind in _INTEGERS:
            fields[number], position = _read_integer(content, position)
        elif kind == _BINARY:
            length, position = _read_varint(content, position)
            position += length
        elif kind == _STRUCT and depth:
            fields[number], position = _read_struct(content, position, depth=depth - 1)
        elif kind in (_BYTE, _DOUBLE):
            position += 1 if kind == _BYTE else 8
        else:
            raise ValueError(f"unknown field type {kind}")
    return fields, position + 1


def _read_integer(content: NDArray[np.uint8], position: int) -> tuple[int, int]:
    folded, position = _read_varint(content, position)
    return (folded >> 1) ^ -(folded & 1), position


def _read_varint(content: NDArray[np.uint8], position: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := int(content[position])) & 128 and shift < _INTEGER_BITS:
        value |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
    return value | byte << shift, position + 1

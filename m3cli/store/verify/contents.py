"""Check the contents of a shard's files: columns, rows, vectors, hashes and skipped rows agree.

The hashes of the files are known to be right: a fault here comes from a writer or a manual change. The Parquet file is
read by row group, together with the same rows of the npy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.errors import count_noun
from m3cli.records import DoneEntry, TokenMatrices
from m3cli.store.layout import (
    ROW_COLUMNS,
    SCALE_BYTES,
    SCALES_COLUMN,
    VECTOR_COLUMNS,
    RowForm,
    colbert_name,
    dense_name,
    hashes_name,
    indptr_name,
    lexical_name,
    row_schema,
    rows_name,
    scales_name,
    skipped_name,
    vector_layout,
)
from m3cli.store.reader import read_blobs
from m3cli.store.verify.ledger import ShardCheck
from m3cli.store.verify.rows import Mask, RowsCheck, name_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What run.json requires of every shard."""

    form: RowForm
    "without kept fields, whose types depend on the input"
    kept: tuple[str, ...]
    max_length: int
    merged: bool
    "whether a row is a complete document, of any length"


def check_contents(root: Path, entry: DoneEntry, expected: Expected) -> ShardCheck:
    """Check the contents of a shard's files."""
    check = ShardCheck(entry.shard.index)
    index, form = check.index, expected.form
    named = {record.name for record in entry.files}
    wanted = {rows_name(index), hashes_name(index)}
    if entry.counts.skipped:
        wanted.add(skipped_name(index))
    if form.format == "npy":
        names = {
            "dense": [dense_name(index)],
            "sparse": [lexical_name(index)],
            "colbert": [colbert_name(index), indptr_name(index), *([scales_name(index)] if form.scaled else [])],
        }
        wanted.update(name for output in form.outputs for name in names[output])
    if named != wanted:
        odd = sorted(named ^ wanted)
        check.add(odd[0], "is missing in the done entry" if odd[0] in wanted else "does not belong to such a shard")
        return check
    with check.reading(rows_name(index)):
        _check_rows(check, root, entry, expected)
    with check.reading(hashes_name(index)):
        open_array(root / hashes_name(index), shape=(entry.counts.documents, 2), dtype="<u8")
    if entry.counts.skipped:
        with check.reading(skipped_name(index)):
            _check_skipped(check, root / skipped_name(index), entry.counts.skipped)
    return check


def _check_rows(check: ShardCheck, root: Path, entry: DoneEntry, expected: Expected) -> None:
    name = rows_name(check.index)
    rows = RowsCheck(max_length=expected.max_length, merged=expected.merged)
    check.id_hashes = rows.id_hashes
    with pq.ParquetFile(root / name, pre_buffer=False) as file:
        odd = _compare_columns(file.schema_arrow, expected)
        if odd:
            check.add(name, odd)
            return
        arrays = ArraysCheck(check, root, expected.form, num_rows=file.metadata.num_rows)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            found = rows.check(table)
            check.add(name, *found)
            if any("nulls" in what for what in found):
                return
            num_tokens = table.column("num_tokens").to_numpy().astype(np.int64)
            first_row = rows.counts.chunks - table.num_rows
            if expected.form.format == "parquet":
                check.add(name, *_check_columns(table, expected.form, num_tokens=num_tokens, first_row=first_row))
            else:
                arrays.check(num_tokens, table.column("chunk_index").to_numpy(), first_row)
        check.add(name, *rows.finish(entry.counts))


def _compare_columns(schema: pa.Schema, expected: Expected) -> str | None:
    plain = row_schema(expected.form)
    names = [name for name, _ in ROW_COLUMNS]
    names += [*expected.kept, *(name for name in plain.names if name not in names)]
    if schema.names != names:
        return f"has columns {', '.join(schema.names)} instead of {', '.join(names)}"
    for wanted in plain:
        if schema.field(wanted.name).type != wanted.type:
            return f"column {wanted.name} is {schema.field(wanted.name).type} instead of {wanted.type}"
    return None


def _check_columns(table: pa.Table, form: RowForm, *, num_tokens: NDArray[Any], first_row: int) -> list[str]:
    """Check the vector columns of a row group."""
    found = []
    for output in form.outputs:
        column = table.column(VECTOR_COLUMNS[output]).combine_chunks()
        if column.null_count:
            found.append(f"column {VECTOR_COLUMNS[output]} has nulls")
        elif output == "dense":
            found += check_dense(column.flatten().to_numpy().reshape(-1, form.dim), first_row=first_row)
        elif output == "sparse":
            found += _check_lists(column, form, num_tokens=num_tokens, first_row=first_row)
        else:
            found += _check_blobs(table, form, num_tokens=num_tokens, first_row=first_row)
    return found


def _check_lists(column: pa.Array, form: RowForm, *, num_tokens: NDArray[Any], first_row: int) -> list[str]:
    indices, values = column.flatten()
    offsets = indices.offsets.to_numpy()
    if not np.array_equal(np.diff(offsets), np.diff(values.offsets.to_numpy())):
        return ["lexical_weights has rows with more indices than values, or fewer"]
    return check_weights(
        (offsets - offsets[0]).astype(np.int64),
        indices.flatten().to_numpy(),
        values.flatten().to_numpy(),
        num_tokens=num_tokens,
        vocabulary=form.vocabulary,
        first_row=first_row,
    )


def _check_blobs(table: pa.Table, form: RowForm, *, num_tokens: NDArray[Any], first_row: int) -> list[str]:
    dtype, width = vector_layout(form)
    kind = np.dtype(dtype).newbyteorder("<")
    indptr, raw = read_blobs(table.column(VECTOR_COLUMNS["colbert"]).combine_chunks(), width * kind.itemsize)
    if raw is None:
        return [f"colbert_vecs has values that are not rows of {width} {dtype}"]
    scales = None
    if form.scaled:
        scale_indptr, scale_bytes = read_blobs(table.column(SCALES_COLUMN).combine_chunks(), SCALE_BYTES)
        if scale_bytes is None or not np.array_equal(scale_indptr, indptr):
            return [f"{SCALES_COLUMN} has values that are not a float32 for each vector"]
        scales = scale_bytes.view("<f4")
    return check_matrices(
        TokenMatrices(indptr=indptr, vectors=raw.view(kind).reshape(-1, width), scales=scales),
        form,
        num_tokens=num_tokens,
        chunk_index=table.column("chunk_index").to_numpy(),
        first_row=first_row,
    )


def _check_skipped(check: ShardCheck, path: Path, expected: int) -> None:
    count = 0
    with path.open("rb") as file:
        for line in file:
            orjson.loads(line)
            count += 1
    if count != expected:
        check.add(skipped_name(check.index), f"lists {count_noun(count, 'row')}, the done entry counts {expected:,}")


NORM_TOLERANCE = 1e-3
BLOCK_BYTES = 1 << 20


def check_norms(vectors: NDArray[Any], scales: NDArray[Any] | None = None) -> Mask:
    """Tell which vectors [N, D], times their scales [N], do not have norm 1, NaN and infinity included."""
    bad = np.empty(len(vectors), np.bool_)
    step = max(1, BLOCK_BYTES // max(1, vectors.shape[1] * 4))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", block, block))
            if scales is not None:
                norms *= scales[start : start + step]
            bad[start : start + step] = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    return bad


def check_dense(vectors: NDArray[Any], *, first_row: int) -> list[str]:
    """Check dense vectors [R, D]."""
    return name_rows(check_norms(vectors), first_row=first_row, what="the dense vector's norm is not 1")


def check_weights(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    *,
    num_tokens: NDArray[Any],
    vocabulary: int,
    first_row: int,
) -> list[str]:
    """Check lexical weights as CSR: indptr [R + 1] from 0, indices and values [Z]."""
    lengths = np.diff(indptr)
    if len(lengths) != len(num_tokens) or indptr[0] != 0 or (lengths < 0).any() or indptr[-1] != len(indices):
        return ["the row offsets do not ascend from 0 to the number of weights"]
    if len(indices) != len(values):
        return [f"{len(indices):,} token ids and {len(values):,} weights"]
    with np.errstate(invalid="ignore"):
        weight = ~((values > 0) & (values < np.inf))
    outside = (indices < 0) | (indices >= vocabulary)
    falls = np.zeros(len(indices), np.bool_)
    falls[1:] = indices[1:] <= indices[:-1]
    falls[indptr[:-1][lengths > 0]] = False
    more = lengths > num_tokens

    def of_rows(bad: Mask) -> Mask:
        rows = np.zeros(len(lengths), np.bool_)
        rows[np.searchsorted(indptr, np.flatnonzero(bad), side="right") - 1] = True
        return rows

    return [
        *name_rows(of_rows(weight), first_row=first_row, what="a lexical weight is not finite and above 0"),
        *name_rows(of_rows(outside), first_row=first_row, what=f"a token id is not below {vocabulary:,}"),
        *name_rows(of_rows(falls), first_row=first_row, what="token ids do not ascend"),
        *name_rows(more, first_row=first_row, what="more lexical weights than tokens"),
    ]


def check_matrices(
    matrices: TokenMatrices, form: RowForm, *, num_tokens: NDArray[Any], chunk_index: NDArray[Any], first_row: int
) -> list[str]:
    """Check ColBERT matrices; a document's own row after its chunks has no vectors."""
    lengths, vectors = np.diff(matrices.indptr), matrices.vectors
    if len(lengths) != len(num_tokens) or (lengths < 0).any() or matrices.indptr[-1] != len(vectors):
        return ["the row offsets do not ascend to the number of vectors"]
    signs = form.colbert.dtype == "binary"
    bad = np.zeros(len(vectors), np.bool_) if signs else check_norms(vectors, matrices.scales)
    rows = np.zeros(len(lengths), np.bool_)
    rows[np.searchsorted(matrices.indptr, np.flatnonzero(bad), side="right") - 1] = True
    most = np.where(chunk_index >= 0, num_tokens - 1, 0)
    if form.exact_vectors:
        wrong, what = lengths != most, "not one ColBERT vector per token except <s>"
    else:
        wrong, what = (
            (lengths > most) | (lengths < np.minimum(most, 1)),
            "no ColBERT vector, or too many",
        )
    return [
        *name_rows(wrong, first_row=first_row, what=what),
        *name_rows(rows, first_row=first_row, what="a ColBERT vector's norm is not 1"),
    ]


PIECE_BYTES = 64 << 20
_WEIGHT_MEMBERS = {"data", "indices", "indptr", "shape", "format"}


class ArraysCheck:
    """Check of a shard's npy arrays, which are opened once."""

    def __init__(self, check: ShardCheck, root: Path, form: RowForm, *, num_rows: int) -> None:
        self._check = check
        self._form = form
        self._dense: _Mapped | None = None
        self._vectors: _Mapped | None = None
        self._indptr: NDArray[np.int64] | None = None
        self._scales: _Mapped | None = None
        self._weights: dict[str, NDArray[Any]] | None = None
        if form.format != "npy":
            return
        index, dense_dtype = check.index, "<f4" if form.dense_dtype == "float32" else "<f2"
        if "dense" in form.outputs:
            with check.reading(dense_name(index)):
                self._dense = open_array(root / dense_name(index), shape=(num_rows, form.dim), dtype=dense_dtype)
        if "sparse" in form.outputs:
            with check.reading(lexical_name(index)):
                self._weights = _open_weights(root / lexical_name(index), shape=(num_rows, form.vocabulary))
        if "colbert" in form.outputs:
            with check.reading(indptr_name(index)):
                self._indptr = _open_indptr(root / indptr_name(index), num_rows=num_rows)
                self._open_vectors(root, num_vectors=int(self._indptr[-1]))

    def _open_vectors(self, root: Path, *, num_vectors: int) -> None:
        check, index = self._check, self._check.index
        dtype, width = vector_layout(self._form)
        kind = np.dtype(dtype).newbyteorder("<").str
        with check.reading(colbert_name(index)):
            if self._form.scaled:
                with check.reading(scales_name(index)):
                    self._scales = open_array(root / scales_name(index), shape=(num_vectors,), dtype="<f4")
            self._vectors = open_array(root / colbert_name(index), shape=(num_vectors, width), dtype=kind)

    def check(self, num_tokens: NDArray[Any], chunk_index: NDArray[Any], first_row: int) -> None:
        """Check the rows of one row group."""
        ends = np.cumsum(np.maximum(num_tokens, 1))
        tokens = max(1, PIECE_BYTES // (self._form.dim * 2))
        start = 0
        while start < len(num_tokens):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + tokens, side="right")))
            self._check_piece(num_tokens[start:stop], chunk_index[start:stop], first_row + start)
            start = stop

    def _check_piece(self, num_tokens: NDArray[Any], chunk_index: NDArray[Any], first_row: int) -> None:
        index, stop = self._check.index, first_row + len(num_tokens)
        if self._dense is not None:
            self._check.add(dense_name(index), *check_dense(self._dense.take(first_row, stop), first_row=first_row))
        if self._weights is not None:
            indptr = self._weights["indptr"][first_row : stop + 1]
            weights = slice(indptr[0], indptr[-1])
            found = check_weights(
                indptr - indptr[0],
                self._weights["indices"][weights],
                self._weights["data"][weights],
                num_tokens=num_tokens,
                vocabulary=self._form.vocabulary,
                first_row=first_row,
            )
            self._check.add(lexical_name(index), *found)
        if self._indptr is not None and self._vectors is not None and (self._scales is not None) == self._form.scaled:
            indptr = self._indptr[first_row : stop + 1]
            span = int(indptr[0]), int(indptr[-1])
            matrices = TokenMatrices(
                indptr=indptr - indptr[0],
                vectors=self._vectors.take(*span),
                scales=None if self._scales is None else self._scales.take(*span),
            )
            found = check_matrices(
                matrices, self._form, num_tokens=num_tokens, chunk_index=chunk_index, first_row=first_row
            )
            self._check.add(colbert_name(index), *found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """Array on disk, mapped slice by slice."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def take(self, start: int, stop: int) -> NDArray[Any]:
        """Map items [start, stop) of the first axis."""
        shape = (stop - start, *self.shape[1:])
        if start == stop:
            return np.empty(shape, self.dtype)
        offset = self.offset + start * self.dtype.itemsize * int(np.prod(self.shape[1:]))
        return np.memmap(self.path, mode="r", offset=offset, shape=shape, dtype=self.dtype)


def open_array(path: Path, *, shape: tuple[int, ...], dtype: str) -> _Mapped:
    """Open an array; raise ValueError for another shape or type, or bytes after it."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(
            f"it holds {array.dtype.name}{list(array.shape)} instead of {np.dtype(dtype).name}{list(shape)}"
        )
    offset = getattr(array, "offset", 0)
    if offset + array.nbytes != path.stat().st_size:
        raise ValueError("there are bytes after its array")
    return _Mapped(path=path, offset=offset, shape=shape, dtype=array.dtype)


def _open_indptr(path: Path, *, num_rows: int) -> NDArray[Any]:
    indptr = np.array(open_array(path, shape=(num_rows + 1,), dtype="<i8").take(0, num_rows + 1))
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError("the row offsets do not ascend from 0")
    return indptr


def _open_weights(path: Path, *, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as archive:
        if set(archive.files) != _WEIGHT_MEMBERS:
            raise ValueError(f"it holds {', '.join(sorted(archive.files))}")
        parts = {name: archive[name] for name in archive.files}
    if parts["format"] != np.array(b"csr") or tuple(parts["shape"].tolist()) != shape:
        raise ValueError(f"it is not a CSR matrix of shape {list(shape)}")
    indptr = parts["indptr"]
    if len(indptr) != shape[0] + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError("the row offsets do not ascend from 0")
    if not indptr[-1] == len(parts["indices"]) == len(parts["data"]):
        raise ValueError("its arrays are of different lengths")
    return parts

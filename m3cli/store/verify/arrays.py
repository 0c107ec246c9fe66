"""The arrays of a shard in the npy format, walked through along the row groups of its rows.

Only a piece of PIECE_BYTES of vectors is mapped at a time; a shard's lexical weights are held whole, as their zip has
them whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.records import TokenMatrices
from m3cli.store.layout import (
    RowForm,
    colbert_name,
    dense_name,
    indptr_name,
    lexical_name,
    scales_name,
    vector_layout,
)
from m3cli.store.verify.faults import ShardCheck
from m3cli.store.verify.vectors import check_dense, check_matrices, check_weights

PIECE_BYTES = 64 << 20
_WEIGHT_MEMBERS = {"data", "indices", "indptr", "shape", "format"}


class ArraysCheck:
    """The arrays of one shard, opened once."""

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
            self._check.say(dense_name(index), *check_dense(self._dense.take(first_row, stop), first_row=first_row))
        if self._weights is not None:
            indptr = self._weights["indptr"][first_row : stop + 1]
            run = slice(indptr[0], indptr[-1])
            found = check_weights(
                indptr - indptr[0],
                self._weights["indices"][run],
                self._weights["data"][run],
                num_tokens=num_tokens,
                vocabulary=self._form.vocabulary,
                first_row=first_row,
            )
            self._check.say(lexical_name(index), *found)
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
            self._check.say(colbert_name(index), *found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """An array on disk, of which only what is looked at is mapped."""

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
    """Open an array that must be of this shape and type, with nothing behind it; else raise ValueError."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(
            f"it holds {array.dtype.name}{list(array.shape)} instead of {np.dtype(dtype).name}{list(shape)}"
        )
    offset = getattr(array, "offset", 0)
    if offset + array.nbytes != path.stat().st_size:
        raise ValueError("there is more in it than its array")
    return _Mapped(path=path, offset=offset, shape=shape, dtype=array.dtype)


def _open_indptr(path: Path, *, num_rows: int) -> NDArray[Any]:
    indptr = np.array(open_array(path, shape=(num_rows + 1,), dtype="<i8").take(0, num_rows + 1))
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError("the places where rows begin do not ascend from 0")
    return indptr


def _open_weights(path: Path, *, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as archive:
        if set(archive.files) != _WEIGHT_MEMBERS:
            raise ValueError(f"it holds {', '.join(sorted(archive.files))}")
        parts = {name: archive[name] for name in archive.files}
    if parts["format"] != np.array(b"csr") or tuple(parts["shape"].tolist()) != shape:
        raise ValueError(f"it is no CSR matrix of shape {list(shape)}")
    indptr = parts["indptr"]
    if len(indptr) != shape[0] + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError("the places where rows begin do not ascend from 0")
    if not indptr[-1] == len(parts["indices"]) == len(parts["data"]):
        raise ValueError("its arrays are of different lengths")
    return parts

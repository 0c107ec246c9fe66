"""Write the arrays of the npy format and the content hashes, header first.

The files are NumPy's own format: `np.load(mmap_mode="r")` and `scipy.sparse.load_npz` open them. A zip member must be
written in one piece, so a shard's lexical weights are kept in memory: 8 bytes each, twice that while they are
concatenated. Zip members carry the date 1980-01-01, so that equal weights are equal bytes.
"""

from __future__ import annotations

import io
import zipfile
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from m3cli.records import Document, Embeddings, LexicalWeights
from m3cli.store.commit import StagedFile, output_errors
from m3cli.store.layout import RowForm, vector_layout


class ArrayFile:
    """Open .npy file of shape [length, *shape], written in order; without a length its header is rewritten at the end.

    NumPy pads headers for the longest possible first axis, so their length does not depend on the value.
    """

    def __init__(self, staged: StagedFile, *, length: int | None, shape: tuple[int, ...] = (), dtype: str) -> None:
        self._staged = staged
        self._length = length
        self._shape = shape
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._written = 0
        self._header_bytes = staged.write(self._header(length or 0))

    def write(self, values: NDArray[Any]) -> None:
        """Append values along the first axis."""
        plain = values.astype(self._dtype, order="C", copy=False)
        self._written += len(plain)
        self._staged.write(plain.data)

    def finish(self) -> None:
        """Check the number of values against the header, or write it into the header."""
        if self._length is None:
            header = self._header(self._written)
            assert len(header) == self._header_bytes
            self._staged.overwrite_start(header)
        elif self._written != self._length:
            raise ValueError(f"{self._staged.name}: its header says {self._length}, {self._written} were written")

    def _header(self, length: int) -> bytes:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        buffer = io.BytesIO()
        content = {"descr": descr, "fortran_order": False, "shape": (length, *self._shape)}
        np.lib.format.write_array_header_1_0(buffer, content)
        return buffer.getvalue()


class DenseFile:
    """Open `dense_vecs/*.npy`."""

    def __init__(self, staged: StagedFile, *, rows: int, dim: int, dtype: str) -> None:
        self._array = ArrayFile(staged, length=rows, shape=(dim,), dtype=dtype)

    def append(self, _rows: pa.Table, embeddings: Embeddings) -> None:
        """Append the vectors of a window."""
        assert embeddings.dense_vecs is not None
        self._array.write(embeddings.dense_vecs)

    def finish(self) -> None:
        """Check that every row was written."""
        self._array.finish()

    def discard(self) -> None:
        """Do nothing: no rows are buffered."""


class ColbertFiles:
    """Open `colbert_vecs/*.npy`, its row offsets, and the scales of int8 vectors."""

    def __init__(
        self,
        vectors: StagedFile,
        indptr: StagedFile,
        scales: StagedFile | None,
        *,
        form: RowForm,
        rows: int,
        num_vectors: int | None,
    ) -> None:
        dtype, width = vector_layout(form)
        self._vectors = ArrayFile(vectors, length=num_vectors, shape=(width,), dtype=dtype)
        self._indptr = ArrayFile(indptr, length=rows + 1, dtype="int64")
        self._indptr.write(np.zeros(1, dtype=np.int64))
        self._scales = None if scales is None else ArrayFile(scales, length=num_vectors, dtype="float32")
        self._end = 0

    def append(self, _rows: pa.Table, embeddings: Embeddings) -> None:
        """Append the vectors of a window."""
        assert embeddings.colbert_vecs is not None
        indptr = embeddings.colbert_vecs.indptr
        span = slice(indptr[0], indptr[-1])
        self._vectors.write(embeddings.colbert_vecs.vectors[span])
        if self._scales is not None:
            assert embeddings.colbert_vecs.scales is not None
            self._scales.write(embeddings.colbert_vecs.scales[span])
        self._indptr.write(indptr[1:] - indptr[0] + self._end)
        self._end += int(indptr[-1] - indptr[0])

    def finish(self) -> None:
        """Check that every row was written."""
        self._vectors.finish()
        self._indptr.finish()
        if self._scales is not None:
            self._scales.finish()

    def discard(self) -> None:
        """Do nothing: no rows are buffered."""


class LexicalFile:
    """Open `lexical_weights/*.npz`."""

    def __init__(self, staged: StagedFile, *, vocabulary: int) -> None:
        self._staged = staged
        self._vocabulary = vocabulary
        self._parts: list[LexicalWeights] = []

    def append(self, _rows: pa.Table, embeddings: Embeddings) -> None:
        """Append the vectors of a window."""
        assert embeddings.lexical_weights is not None
        self._parts.append(embeddings.lexical_weights)

    def finish(self) -> None:
        """Write all weights with the member names of `scipy.sparse.save_npz(..., compressed=False)`."""
        counts = np.concatenate([np.zeros(1, dtype=np.int64), *(np.diff(part.indptr) for part in self._parts)])
        indptr = np.cumsum(counts)
        kind = np.int32 if indptr[-1] < 2**31 else np.int64  # SciPy uses one type for both, the smaller one if possible
        members = {
            "indices": _join([part.indices[part.indptr[0] : part.indptr[-1]] for part in self._parts], kind),
            "indptr": indptr.astype(kind),
            "format": np.array(b"csr"),
            "shape": np.array([len(counts) - 1, self._vocabulary], dtype=np.int64),
            "data": _join([part.values[part.indptr[0] : part.indptr[-1]] for part in self._parts], np.float32),
        }
        with output_errors(self._staged.path), zipfile.ZipFile(cast(IO[bytes], self._staged), "w") as archive:
            for name, array in members.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def discard(self) -> None:
        """Drop the buffered weights."""
        self._parts = []


def _join(parts: list[NDArray[Any]], kind: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=kind), *parts], dtype=kind, casting="unsafe")


def write_hashes(staged: StagedFile, documents: tuple[Document, ...]) -> None:
    """Write `_m3/hashes/*.npy`: [documents, 2] uint64, high and low half of each text's xxh3_128."""
    array = ArrayFile(staged, length=len(documents), shape=(2,), dtype="uint64")
    array.write(np.array([document.text_hash for document in documents], dtype=np.uint64).reshape(-1, 2))
    array.finish()

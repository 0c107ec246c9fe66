"""Target `npy`: one array for the folder: dense vectors, lexical weights as SciPy's CSR, ColBERT vectors with indptr.

The arrays are written from front to back, part by part; their headers are written last, when the lengths are known.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    OpenFile,
    Part,
    Read,
    Shape,
    Sink,
    Target,
    decode_vectors,
    fill_template,
    list_rows,
)
from m3cli.records import LexicalWeights, TokenMatrices

KEYS_NAME = "keys.jsonl"


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:
    """Write a folder's arrays."""
    keys = open_file(KEYS_NAME)
    dense = _Array(open_file("dense.npy"), shape.dense_dtype, shape.dim) if "dense" in shape.outputs else None
    colbert = None
    if "colbert" in shape.outputs:
        width = None if shape.colbert_dtype == "float16" else "float32"
        colbert = _Array(open_file("colbert.npy"), width or "float16", shape.dim)
    lexical_ends, colbert_ends = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    for part in read(None):
        write_keys(keys, part, lost)
        embeddings = part.embeddings
        if dense is not None:
            dense.append(embeddings.dense_vecs)
        if colbert is not None:
            matrices = cast(TokenMatrices, embeddings.colbert_vecs)
            colbert.append(decode_vectors(matrices, colbert.dtype))
            colbert_ends.append(matrices.indptr[1:] + colbert_ends[-1][-1])
        if embeddings.lexical_weights is not None:
            lexical_ends.append(embeddings.lexical_weights.indptr[1:] + lexical_ends[-1][-1])
    for array in (dense, colbert):
        if array is not None:
            array.finish()
    if colbert is not None:
        ends = _Array(open_file("colbert.indptr.npy"), "int64")
        ends.append(np.concatenate(colbert_ends))
        ends.finish()
    if "sparse" in shape.outputs:
        _write_csr(read, open_file("sparse.npz"), shape, np.concatenate(lexical_ends))


def write_keys(sink: Sink, part: Part, lost: LeftOut) -> None:
    """Append a line a row: a JSON object with its key and the plain columns."""
    rows = zip(part.keys.to_pylist(), list_rows(part, lost), strict=True)
    option = orjson.OPT_APPEND_NEWLINE
    sink.write(b"".join(orjson.dumps({"key": key, **row}, default=str, option=option) for key, row in rows))


class _Array:
    """An open .npy whose length is written when it is known."""

    def __init__(self, sink: Sink, dtype: str, width: int | None = None) -> None:
        self.dtype = dtype
        self._sink, self._width, self._length = sink, width, 0
        sink.write(self._header())

    def append(self, values: Any) -> None:
        """Append rows."""
        values = np.ascontiguousarray(values, self.dtype)
        self._length += len(values)
        self._sink.write(memoryview(values).cast("B") if values.size else b"")

    def finish(self) -> None:
        """Write the header."""
        self._sink.overwrite_start(self._header())

    def _header(self) -> bytes:
        shape = (self._length,) if self._width is None else (self._length, self._width)
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(self.dtype)), "fortran_order": False}
        text = repr({**described, "shape": shape}).encode()
        padding = 192 - 10 - len(text) - 1
        return b"\x93NUMPY\x01\x00" + (192 - 10).to_bytes(2, "little") + text + b" " * padding + b"\n"


def _write_csr(read: Read, sink: Sink, shape: Shape, indptr: NDArray[np.int64]) -> None:
    """Write what `scipy.sparse.load_npz` opens; weights are read once more for each of the two long arrays."""
    kind = np.int32 if indptr[-1] < 2**31 else np.int64  # SciPy wants one type for both, the smaller if it will do
    small = {
        "indptr": indptr.astype(kind),
        "format": np.array(b"csr"),
        "shape": np.array([len(indptr) - 1, shape.vocabulary], np.int64),
    }
    with zipfile.ZipFile(cast(IO[bytes], sink), "w") as archive:
        for name, array in small.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        for name, dtype in (("indices", kind), ("data", np.float32)):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (int(indptr[-1]),)}
                np.lib.format.write_array_header_1_0(member, header)
                for lexical in _read_lexical(read):
                    values = lexical.indices if name == "indices" else lexical.values
                    member.write(np.ascontiguousarray(values, dtype).tobytes())


def _read_lexical(read: Read) -> Iterator[LexicalWeights]:
    for part in read(("sparse",)):
        yield cast(LexicalWeights, part.embeddings.lexical_weights)


def describe(shape: Shape) -> Mapping[str, bytes]:
    """Write the README."""
    return {README_NAME: fill_template("npy.md", vocabulary=shape.vocabulary)}


TARGET = Target(outputs=("dense", "sparse", "colbert"), write=write, describe=describe, whole=True)

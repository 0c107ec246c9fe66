"""Target `parquet`: plain lists of float32 that any warehouse loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    OpenFile,
    Part,
    Read,
    Shape,
    Target,
    check_names,
    decode_vectors,
    fill_template,
    widen,
)

_LISTS = {
    "dense": [("dense_vecs", pa.list_(pa.float32()))],
    "sparse": [("lexical_indices", pa.list_(pa.int32())), ("lexical_values", pa.list_(pa.float32()))],
    "colbert": [("colbert_vecs", pa.list_(pa.list_(pa.float32())))],
}


def make_schema(shape: Shape) -> Any:
    """Return the columns: key, the plain ones, kept fields and text as they are, then the vectors."""
    vectors = [pa.field(name, kind) for output in shape.outputs for name, kind in _LISTS[output]]
    return pa.schema([pa.field("key", pa.string()), *shape.columns, *vectors])


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:  # noqa: ARG001  it can hold all
    """Write a shard as one Parquet file, a row group a part."""
    schema = make_schema(shape)
    with pq.ParquetWriter(open_file(".parquet"), schema, compression="zstd", use_dictionary=False) as writer:
        for part in read(None):
            writer.write_table(_make_table(part, schema), row_group_size=part.num_rows)


def _make_table(part: Part, schema: Any) -> Any:
    columns = [part.keys.cast(pa.string()), *part.rows.columns]
    embeddings = part.embeddings
    if embeddings.dense_vecs is not None:
        columns.append(list_vectors(widen(embeddings.dense_vecs)))
    if (lexical := embeddings.lexical_weights) is not None:
        offsets = pa.array(lexical.indptr.astype(np.int32))
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(lexical.indices.astype(np.int32))))
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(lexical.values)))
    if (colbert := embeddings.colbert_vecs) is not None:
        vectors = list_vectors(decode_vectors(colbert))
        columns.append(pa.ListArray.from_arrays(pa.array(colbert.indptr.astype(np.int32)), vectors))
    return pa.table(columns, schema=schema)


def list_vectors(vectors: Any) -> Any:
    """Return an Arrow list array of vectors [N, D], a list each; numbers are not copied."""
    count, width = vectors.shape
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(width)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1)))


def describe(shape: Shape) -> Mapping[str, bytes]:
    """Write the README."""
    names = ", ".join(make_schema(shape).names)
    return {README_NAME: fill_template("parquet.md", names=names, name=shape.name)}


def check(shape: Shape) -> None:
    """Check that no kept field has the name of a column of ours."""
    ours = ("key", *(name for output in shape.outputs for name, _ in _LISTS[output]))
    check_names(shape, ours, bool, "the Parquet export")


TARGET = Target(
    outputs=("dense", "sparse", "colbert"), write=write, describe=describe, check=check, number_bytes=4, weight_bytes=8
)

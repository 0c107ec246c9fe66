"""Target `lance`: a Lance dataset, which LanceDB opens as a table.

Lance names its own files and writes the time into its manifests, so the dataset is not the same bytes twice; its rows
are. It is written in staging and published as a whole. Sparse weights are stored, and not searched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from m3cli.errors import UsageError
from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    Part,
    Read,
    Shape,
    Target,
    check_names,
    decode_vectors,
    fill_template,
)

MAX_BYTES_PER_FILE = 4 << 30


def make_schema(shape: Shape) -> Any:
    """Return the dataset's columns."""
    number = {"dense": shape.dense_dtype, "colbert": "float16" if shape.colbert_dtype == "float16" else "float32"}
    vector = {output: pa.list_(getattr(pa, kind)(), shape.dim) for output, kind in number.items()}
    kinds = {
        "dense": pa.field("dense_vecs", vector["dense"]),
        "sparse": pa.field(
            "lexical_weights", pa.struct([("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))])
        ),
        "colbert": pa.field("colbert_vecs", pa.list_(vector["colbert"])),
    }
    return pa.schema([pa.field("key", pa.string()), *shape.columns, *(kinds[output] for output in shape.outputs)])


def write_folder(read: Read, path: Path, shape: Shape, lost: LeftOut) -> None:  # noqa: ARG001  it can hold all
    """Write all rows as a new dataset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import lance  # noqa: PLC0415
        except ImportError as error:
            raise UsageError("--to lance: its writer is not installed; pip install pylance") from error

        schema = make_schema(shape)
        batches = pa.RecordBatchReader.from_batches(schema, _make_batches(read, schema))
        lance.write_dataset(batches, str(path), schema=schema, mode="create", max_bytes_per_file=MAX_BYTES_PER_FILE)


def _make_batches(read: Read, schema: Any) -> Iterator[Any]:
    for part in read(None):
        yield from pa.table(_make_columns(part, schema), schema=schema).to_batches()


def _make_columns(part: Part, schema: Any) -> list[Any]:
    columns = [part.keys.cast(pa.string()), *part.rows.columns]
    embeddings = part.embeddings
    if (dense := embeddings.dense_vecs) is not None:
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(dense.reshape(-1)), dense.shape[1]))
    if (lexical := embeddings.lexical_weights) is not None:
        offsets = pa.array(lexical.indptr.astype(np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(each)) for each in (lexical.indices, lexical.values)]
        columns.append(pa.StructArray.from_arrays(lists, names=["indices", "values"]))
    if (colbert := embeddings.colbert_vecs) is not None:
        vectors = decode_vectors(colbert, schema.field("colbert_vecs").type.value_type.value_type.to_pandas_dtype())
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        columns.append(pa.ListArray.from_arrays(pa.array(colbert.indptr.astype(np.int32)), flat))
    return columns


def describe(shape: Shape) -> dict[str, bytes]:
    """Write the README."""
    return {README_NAME: fill_template("lance.md", name=shape.name)}


def check(shape: Shape) -> None:
    """Check that kept fields can be columns."""
    if not shape.name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UsageError(f"--name {shape.name!r}: a table's name has letters, digits, '_', '-' and '.' only")
    taken = ("key", "dense_vecs", "lexical_weights", "colbert_vecs")
    check_names(shape, taken, lambda name: "." not in name, "a Lance table")


TARGET = Target(
    outputs=("dense", "sparse", "colbert"),
    write_folder=write_folder,
    folder_ending=".lance",
    whole=True,
    describe=describe,
    check=check,
    number_bytes=2,
    weight_bytes=8,
)

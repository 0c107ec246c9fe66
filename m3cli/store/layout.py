"""Names of the files in an output folder, the columns of a row, and estimated sizes; opens no file.

    rows/shard-0000000.parquet            one row per chunk; with the parquet format the vectors are columns here
    dense_vecs/shard-0000000.npy          npy format
    lexical_weights/shard-0000000.npz     npy format
    colbert_vecs/shard-0000000.npy        npy format, with shard-0000000.indptr.npy, and for int8 vectors
                                          shard-0000000.scales.npy
    _m3/run.json _m3/done/ _m3/skipped/ _m3/hashes/ _m3/manifest.json _m3/lock* _m3/metrics*.json _m3/tmp/<worker>/

A name is a path below the folder with '/', as in done entries. `text` is reserved even if no text is kept, so that a
column of that name is the chunk's text in every folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from m3cli.config import PLAIN_COLBERT, ColbertForm, Format, VectorCompression, VectorDtype
from m3cli.records import Output

FORMAT_VERSION = 1
META = "_m3"
RUN_NAME = "_m3/run.json"
MANIFEST_NAME = "_m3/manifest.json"
METRICS_NAME = "_m3/metrics.json"
WORKER_METRICS = "_m3/metrics.{worker}.json"
LOCK_NAME = "_m3/lock"
DONE_FOLDER = "_m3/done"
TMP_FOLDER = "_m3/tmp"

MAX_MATRIX_BYTES = 2**31 - 1
"the longest value Parquet can hold; a longer ColBERT matrix cannot be a row of the parquet format"

ROW_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("id", pa.string()),
    ("chunk_index", pa.int32()),
    ("num_chunks", pa.int32()),
    ("char_start", pa.int64()),
    ("char_end", pa.int64()),
    ("num_tokens", pa.int32()),
    ("truncated", pa.bool_()),
)
TEXT_COLUMN = "text"
VECTOR_COLUMNS: dict[Output, str] = {"dense": "dense_vecs", "sparse": "lexical_weights", "colbert": "colbert_vecs"}
SCALES_COLUMN = "colbert_scales"
"exists if `colbert_vecs` are int8"
RESERVED_COLUMNS = frozenset([*(name for name, _ in ROW_COLUMNS), TEXT_COLUMN, *VECTOR_COLUMNS.values(), SCALES_COLUMN])
SCALE_BYTES = 4

# Upper estimates: random ids and less repetitive text take more than what scripts/bench_results/LOG.md measures.
ROW_BYTES = 48
TEXT_RATIO = 0.55
# Distinct tokens per token, an upper estimate (same log); each weight takes 4 bytes of id and 4 of value.
WEIGHTS_PER_TOKEN = 0.6
WEIGHT_BYTES = 8
HASH_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RowForm:
    """Columns of a folder's rows and their types, the same for every shard."""

    format: Format
    outputs: tuple[Output, ...]
    dim: int
    "width of dense and ColBERT vectors"
    vocabulary: int
    "token ids are below this"
    dense_dtype: VectorDtype = "float16"
    keep_text: bool = False
    kept: Any = None
    "pyarrow.Schema of the kept fields, None if nothing is kept"
    colbert: ColbertForm = PLAIN_COLBERT
    compression: VectorCompression = "none"
    "of the vectors in Parquet"
    exact_vectors: bool = True
    "whether a row has a ColBERT vector for every token but <s>"

    @property
    def scaled(self) -> bool:
        """Whether each ColBERT vector has a scale."""
        return "colbert" in self.outputs and self.colbert.dtype == "int8"

    @property
    def vector_bytes(self) -> int:
        """Bytes of a stored ColBERT vector, without its scale."""
        return self.colbert.vector_bytes(self.dim)


def vector_layout(form: RowForm) -> tuple[str, int]:
    """Return the NumPy dtype of stored ColBERT vectors, and the length of a vector in it."""
    if form.colbert.dtype == "binary":
        return "uint8", form.dim // 8
    return form.colbert.dtype, form.dim


def shard_stem(index: int) -> str:
    """Return a shard's file name without its suffix."""
    return f"shard-{index:07d}"


def rows_name(index: int) -> str:
    """Return the name of a shard's rows."""
    return f"rows/{shard_stem(index)}.parquet"


def dense_name(index: int) -> str:
    """Return the name of a shard's dense vectors in the npy format."""
    return f"dense_vecs/{shard_stem(index)}.npy"


def lexical_name(index: int) -> str:
    """Return the name of a shard's lexical weights in the npy format."""
    return f"lexical_weights/{shard_stem(index)}.npz"


def colbert_name(index: int) -> str:
    """Return the name of a shard's ColBERT vectors in the npy format."""
    return f"colbert_vecs/{shard_stem(index)}.npy"


def indptr_name(index: int) -> str:
    """Return the name of the row offsets of a shard's ColBERT vectors in the npy format."""
    return f"colbert_vecs/{shard_stem(index)}.indptr.npy"


def scales_name(index: int) -> str:
    """Return the name of the scales of a shard's int8 ColBERT vectors in the npy format."""
    return f"colbert_vecs/{shard_stem(index)}.scales.npy"


def done_name(index: int) -> str:
    """Return the name of a shard's done entry."""
    return f"{DONE_FOLDER}/{shard_stem(index)}.json"


def skipped_name(index: int) -> str:
    """Return the name of the list of a shard's skipped rows, which exists if there are any."""
    return f"_m3/skipped/{shard_stem(index)}.jsonl"


def hashes_name(index: int) -> str:
    """Return the name of a shard's content hashes."""
    return f"_m3/hashes/{shard_stem(index)}.npy"


def worker_name(worker: int, num_workers: int) -> str:
    """Return the name of a worker in its lock, its tmp folder and its metrics."""
    return f"{worker}-of-{num_workers}"


DATA_NAMES: tuple[Callable[[int], str], ...] = (
    *(rows_name, dense_name, lexical_name, colbert_name, indptr_name, scales_name),
    *(skipped_name, hashes_name),
)
"of every file that a shard can have, except its done entry"
SHARD_FOLDERS = ("rows", *VECTOR_COLUMNS.values(), DONE_FOLDER, f"{META}/skipped", f"{META}/hashes")
_STEM = re.compile(r"shard-(\d{7,})\.")


def shard_of(name: str) -> int | None:
    """Return the shard of a file's name; None if m3 writes no file of that name."""
    match = _STEM.match(Path(name).name)
    if match is None:
        return None
    index = int(match[1])
    return index if any(name == name_of(index) for name_of in (done_name, *DATA_NAMES)) else None


def is_meta_name(name: str) -> bool:
    """Whether m3 writes a file of this name into `_m3` itself."""
    return name in (RUN_NAME, MANIFEST_NAME, LOCK_NAME) or name.startswith((f"{LOCK_NAME}.", "_m3/metrics."))


def row_schema(form: RowForm) -> pa.Schema:
    """Build the schema of `rows/*.parquet`: m3's columns, kept fields, kept text, then vectors (parquet format)."""
    fields = [pa.field(name, kind) for name, kind in ROW_COLUMNS]
    # Metadata of a source's schema (index of pandas, field ids) does not apply to this file.
    fields += [field.remove_metadata() for field in (form.kept or ())]
    if form.keep_text:
        fields.append(pa.field(TEXT_COLUMN, pa.string()))
    if form.format == "parquet":
        fields += _vector_fields(form)
    return pa.schema(fields)


def _vector_fields(form: RowForm) -> list[pa.Field]:
    kinds = {
        "dense": pa.field("dense_vecs", pa.list_(getattr(pa, form.dense_dtype)(), form.dim)),
        "sparse": pa.field(
            "lexical_weights", pa.struct([("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))])
        ),
        "colbert": pa.field("colbert_vecs", pa.large_binary(), metadata=_describe_vectors(form)),
    }
    fields = [kinds[output] for output in VECTOR_COLUMNS if output in form.outputs]
    if form.scaled:
        fields.append(pa.field(SCALES_COLUMN, pa.large_binary(), metadata={"dtype": "float32"}))
    return fields


def _describe_vectors(form: RowForm) -> dict[str, str]:
    dtype, width = vector_layout(form)
    described = {"dtype": dtype, "dim": str(form.dim)}
    if width != form.dim:
        described["width"] = str(width)
    return described


def estimate_bytes(
    form: RowForm, *, documents: int, rows: int, weights: int, vectors: int, text_bytes: int = 0, kept_bytes: int = 0
) -> dict[str, int]:
    """Estimate the bytes on disk of "rows", of each output, and of "_m3" (the content hashes).

    Args:
        form: columns and types.
        documents: number of documents.
        rows: number of rows.
        weights: number of lexical weights.
        vectors: number of stored ColBERT vectors.
        text_bytes: bytes of the rows' texts, which count if text is kept.
        kept_bytes: bytes of the rows' kept fields.
    """
    repeating = kept_bytes + (text_bytes if form.keep_text else 0)
    sizes = {"rows": rows * ROW_BYTES + int(repeating * TEXT_RATIO)}
    if "dense" in form.outputs:
        sizes["dense"] = rows * form.dim * (4 if form.dense_dtype == "float32" else 2)
    if "sparse" in form.outputs:
        sizes["sparse"] = weights * WEIGHT_BYTES + rows * 4
    if "colbert" in form.outputs:
        sizes["colbert"] = vectors * (form.vector_bytes + (SCALE_BYTES if form.scaled else 0)) + rows * 8
    return {**sizes, "_m3": documents * HASH_BYTES}

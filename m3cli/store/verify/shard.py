"""What the files of one shard say, whose hashes are true: columns, rows, vectors, hashes and skipped rows agree.

A fault here is not the disk's but a writer's, or a hand's that sealed what it changed. The Parquet file is read a row
group at a time, the arrays of the npy format along with it (arrays.py).
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
from m3cli.store.blobs import read_blobs
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
from m3cli.store.verify.arrays import ArraysCheck, open_array
from m3cli.store.verify.faults import ShardCheck
from m3cli.store.verify.rows import RowsCheck
from m3cli.store.verify.vectors import check_dense, check_matrices, check_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What every shard of the folder is to be like, as run.json says."""

    form: RowForm
    "without the kept fields, whose types only the input knows"
    kept: tuple[str, ...]
    max_length: int
    merged: bool
    "whether a row is a document, of any length"


def check_contents(root: Path, entry: DoneEntry, expected: Expected) -> ShardCheck:
    """Check what the files of a shard say."""
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
        check.say(odd[0], "is missing in the done entry" if odd[0] in wanted else "is no file of such a shard")
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
            check.say(name, odd)
            return
        arrays = ArraysCheck(check, root, expected.form, num_rows=file.metadata.num_rows)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            found = rows.check(table)
            check.say(name, *found)
            if any("nulls" in what for what in found):
                return
            num_tokens = table.column("num_tokens").to_numpy().astype(np.int64)
            first_row = rows.counts.chunks - table.num_rows
            if expected.form.format == "parquet":
                check.say(name, *_check_columns(table, expected.form, num_tokens=num_tokens, first_row=first_row))
            else:
                arrays.check(num_tokens, table.column("chunk_index").to_numpy(), first_row)
        check.say(name, *rows.finish(entry.counts))


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
        return [f"colbert_vecs has values that are no rows of {width} {dtype}"]
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
        check.say(skipped_name(check.index), f"lists {count_noun(count, 'row')}, the done entry counts {expected:,}")

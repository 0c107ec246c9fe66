"""Read an output folder, complete or not, in either format; no locks, no writes.

Only shards with a done entry are read, whose files are complete. Arrays of the npy format are memory-mapped. The
parquet format is read by row group (`iter_parts`) or by shard (`read_shard`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.config import ALL_OUTPUTS, RunConfig
from m3cli.errors import DamageFound, OutputError, UsageError, check_reachable
from m3cli.paths import close_read, exists, is_folder
from m3cli.records import DoneEntry, Embeddings, LexicalWeights, Manifest, Output, ShardCounts, TokenMatrices
from m3cli.store.documents import (
    find_misplaced,
    is_ours,
    list_wrong_lengths,
    name_check,
    name_repair,
    read_entries,
    read_manifest,
    read_metrics,
    read_run,
    reading,
)
from m3cli.store.layout import (
    RUN_NAME,
    SCALES_COLUMN,
    VECTOR_COLUMNS,
    RowForm,
    colbert_name,
    dense_name,
    done_name,
    indptr_name,
    lexical_name,
    row_schema,
    rows_name,
    scales_name,
)
from m3cli.store.parquet import DensePages, vector_columns
from m3cli.store.verify.rows import hash_ids

_DENSE = VECTOR_COLUMNS["dense"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFolder:
    """Documents of an output folder at the time it was opened."""

    path: Path
    run: RunConfig
    entries: dict[int, DoneEntry]
    "by shard number, ascending"
    manifest: Manifest | None
    "None: work remains"

    @property
    def counts(self) -> ShardCounts:
        """Sums over the done shards."""
        return sum((entry.counts for entry in self.entries.values()), ShardCounts())


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardArrays:
    """Consecutive rows of a shard."""

    shard: int
    rows: Any
    "pyarrow.Table of R rows, without vector columns"
    embeddings: Embeddings
    "of the same rows; outputs that are missing or were not requested are None"


def open_folder(path: Path) -> OutputFolder:
    """Read the documents of a folder.

    Raises:
        UsageError: the folder is missing, not one of m3's, or empty.
        DamageFound: one of the documents is damaged.
    """
    root = path.absolute()
    check_reachable(root / "_m3", OutputError)
    if not is_folder(root):
        raise UsageError(f"{path}: no such folder")
    if not is_ours(root):
        raise UsageError(f"{path} is not an m3 folder: it has no _m3/run.json")
    try:
        return _read_documents(root)
    except DamageFound as damage:
        raise DamageFound(f"{damage}; {name_check(path)}") from damage


def _read_documents(root: Path) -> OutputFolder:
    # The manifest first: a run may finish in between, and entries read before that would be incomplete.
    manifest = read_manifest(root)
    entries, faults = read_entries(root)
    run = read_run(root)
    if run is None and not entries and not faults:
        raise UsageError(f"{root}: nothing has been encoded there yet; run m3 encode")
    if run is None:
        raise DamageFound(f"{root / RUN_NAME} is missing")
    faults += [
        f"{root / done_name(index)} counts to a source that {RUN_NAME} does not have"
        for index in find_misplaced(entries, run)
    ]
    for fault in faults:
        raise DamageFound(fault)
    return OutputFolder(path=root, run=run, entries=entries, manifest=manifest)


def iter_parts(
    folder: OutputFolder,
    *,
    outputs: Sequence[Output] = ALL_OUTPUTS,
    columns: Sequence[str] | None = None,
    wanted: Mapping[int, NDArray[np.int64]] | None = None,
) -> Iterator[ShardArrays]:
    """Read all done shards in order, one row group at a time.

    Args:
        folder: the folder.
        outputs: vectors to read.
        columns: other columns to read; None: all.
        wanted: ascending row numbers by shard; row groups without any are skipped. None: all.
    """
    for index in folder.entries:
        rows = None if wanted is None else wanted.get(index, np.empty(0, np.int64))
        if rows is None or len(rows):
            yield from _iter_shard(folder, index, outputs=outputs, columns=columns, wanted=rows)


def read_shard(
    folder: OutputFolder, index: int, *, outputs: Sequence[Output] = ALL_OUTPUTS, columns: Sequence[str] | None = None
) -> ShardArrays:
    """Read a done shard; `columns` are the columns to read besides the vectors, None for all."""
    if index not in folder.entries:
        raise UsageError(f"{folder.path}: shard {index} is not done")
    check_lengths(folder, index)
    with reading(folder.path, index), _open_rows(folder.path, index) as file:
        names = _choose_columns(file.schema_arrow, outputs=outputs, columns=columns)
        table = file.read(columns=names, use_threads=False)
        return _to_arrays(folder.path, index, table, outputs=outputs, first_row=0)


def read_table(folder: OutputFolder, form: RowForm) -> Any:
    """Read all rows as a pyarrow.Table, with vectors as columns of the parquet format whatever the folder's is."""
    schema = row_schema(replace(form, format="parquet"))
    tables: list[pa.Table] = []
    for part in iter_parts(folder):
        table = part.rows
        for name, column in vector_columns(part.embeddings, form, 0, table.num_rows).items():
            table = table.append_column(schema.field(name), column)
        tables.append(table)
    return pa.concat_tables(tables) if tables else schema.empty_table()


def check_lengths(folder: OutputFolder, index: int) -> None:
    """Raise DamageFound if a file of a shard is missing or has another length."""
    for wrong in list_wrong_lengths(folder.path, [folder.entries[index]]):
        raise DamageFound(f"{wrong}; {name_repair(folder.path)}")


def _iter_shard(
    folder: OutputFolder,
    index: int,
    *,
    outputs: Sequence[Output],
    columns: Sequence[str] | None,
    wanted: NDArray[np.int64] | None = None,
) -> Iterator[ShardArrays]:
    first_row = 0
    check_lengths(folder, index)
    with reading(folder.path, index):
        file = _open_rows(folder.path, index)
        names = _choose_columns(file.schema_arrow, outputs=outputs, columns=columns)
        pages = DensePages(file, folder.path / rows_name(index)) if _DENSE in names else None
    try:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if wanted is None or np.diff(np.searchsorted(wanted, [first_row, first_row + num_rows]))[0]:
                with reading(folder.path, index):
                    dense = None if pages is None else pages.read(group)
                    remaining = names if dense is None else [name for name in names if name != _DENSE]
                    table = file.read_row_group(group, columns=remaining, use_threads=False)
                    part = _to_arrays(folder.path, index, table, outputs=outputs, first_row=first_row, dense=dense)
                yield part
            first_row += num_rows
    finally:
        close_read(file)


def _open_rows(root: Path, index: int) -> pq.ParquetFile:
    return pq.ParquetFile(root / rows_name(index), memory_map=True)


def _choose_columns(schema: pa.Schema, *, outputs: Sequence[Output], columns: Sequence[str] | None) -> list[str]:
    vectors = [VECTOR_COLUMNS[output] for output in outputs]
    if "colbert" in outputs:
        vectors.append(SCALES_COLUMN)
    scalars = [name for name in schema.names if name not in VECTOR_COLUMNS.values() and name != SCALES_COLUMN]
    unknown = [name for name in columns or () if name not in scalars]
    if unknown:
        raise UsageError(f"no column {unknown[0]!r}; there are {', '.join(scalars)}")
    wanted = scalars if columns is None else columns
    return [name for name in schema.names if name in wanted or name in vectors]


def _to_arrays(
    root: Path,
    index: int,
    table: pa.Table,
    *,
    outputs: Sequence[Output],
    first_row: int,
    dense: NDArray[np.floating] | None = None,
) -> ShardArrays:
    stop = first_row + table.num_rows
    present = [name for name in (*VECTOR_COLUMNS.values(), SCALES_COLUMN) if name in table.column_names]
    vectors = _from_columns(table.select(present)) if present else _from_files(root, index, outputs, first_row, stop)
    embeddings = Embeddings(
        rows=np.arange(first_row, stop, dtype=np.int64),
        dense_vecs=vectors.get("dense") if dense is None else dense,
        lexical_weights=vectors.get("sparse"),
        colbert_vecs=vectors.get("colbert"),
    )
    return ShardArrays(shard=index, rows=table.drop_columns(present), embeddings=embeddings)


def _from_columns(table: pa.Table) -> dict[str, Any]:
    readers = {"dense": _read_dense, "sparse": _read_lexical, "colbert": _read_colbert}
    vectors: dict[str, Any] = {
        output: readers[output](_combine(table.column(name)), table.field(name))
        for output, name in VECTOR_COLUMNS.items()
        if name in table.column_names
    }
    if SCALES_COLUMN in table.column_names:
        _, scales = _view_blobs(_combine(table.column(SCALES_COLUMN)), np.dtype("<f4"), width=1)
        vectors["colbert"] = replace(vectors["colbert"], scales=scales.reshape(-1))
    return vectors


def _combine(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _read_dense(array: pa.Array, _field: pa.Field) -> NDArray[Any]:
    flat: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(array), array.type.list_size)


def _read_lexical(array: pa.Array, _field: pa.Field) -> LexicalWeights:
    indices, values = array.flatten()
    offsets = indices.offsets.to_numpy().astype(np.int64)
    return LexicalWeights(
        indptr=offsets - offsets[0], indices=indices.flatten().to_numpy(), values=values.flatten().to_numpy()
    )


def _read_colbert(array: pa.Array, field: pa.Field) -> TokenMatrices:
    described = field.metadata
    dtype = np.dtype(described[b"dtype"].decode()).newbyteorder("<")
    indptr, vectors = _view_blobs(array, dtype, width=int(described.get(b"width", described[b"dim"])))
    return TokenMatrices(indptr=indptr, vectors=vectors)


def _view_blobs(array: pa.Array, dtype: np.dtype[Any], *, width: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the row offsets [R + 1] of a binary array, and its items [N, width]."""
    indptr, raw = read_blobs(array, width * dtype.itemsize)
    if raw is None:
        raise ValueError(f"the length of a value is not a multiple of {width} {dtype}")
    return indptr, raw.view(dtype).reshape(-1, width)


def _from_files(root: Path, index: int, outputs: Sequence[Output], first: int, stop: int) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if "dense" in outputs and exists(root / dense_name(index)):
        vectors["dense"] = _map_array(root / dense_name(index))[first:stop]
    if "sparse" in outputs and exists(root / lexical_name(index)):
        with np.load(root / lexical_name(index)) as parts:
            indptr = parts["indptr"].astype(np.int64)[first : stop + 1]
            span = slice(indptr[0], indptr[-1])
            indices, values = parts["indices"][span].astype(np.uint32), parts["data"][span]
        vectors["sparse"] = LexicalWeights(indptr=indptr - indptr[0], indices=indices, values=values)
    if "colbert" in outputs and exists(root / colbert_name(index)):
        indptr = np.load(root / indptr_name(index))[first : stop + 1]
        span = slice(indptr[0], indptr[-1])
        scales = root / scales_name(index)
        vectors["colbert"] = TokenMatrices(
            indptr=indptr - indptr[0],
            vectors=_map_array(root / colbert_name(index))[span],
            scales=np.load(scales)[span] if exists(scales) else None,
        )
    return vectors


def _map_array(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array


def read_blobs(array: pa.Array, size: int) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
    """Return the row offsets [R + 1] in items of `size` bytes, and the bytes of all items.

    The bytes are None if a value is null or its length is not a multiple of `size`.
    """
    if not len(array):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    _, starts, data = array.buffers()
    offsets = np.frombuffer(starts, np.int64)[array.offset : array.offset + len(array) + 1]
    indptr = (offsets - offsets[0]) // size
    if array.null_count or (np.diff(offsets) % size).any():
        return indptr, None
    return indptr, np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderDescription:
    """The output of `m3 info`."""

    run: dict[str, Any]
    "members of run.json"
    complete: bool
    num_shards: int
    "number of done shards"
    counts: ShardCounts
    bytes: dict[str, int]
    'of "rows", of existing outputs ("dense", "sparse", "colbert"), and of "_m3": hashes and skipped rows'
    token_histogram: dict[int, int]
    "number of rows with k/2 < num_tokens <= k, by ascending powers of two k"
    metrics: dict[str, Any] | None
    "of all runs and workers that have ended, added up; None: none has"


def describe(folder: OutputFolder) -> FolderDescription:
    """Describe the done shards of a folder."""
    sizes: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for index, entry in folder.entries.items():
        sizes.update(_file_bytes(entry))
        check_lengths(folder, index)
        with reading(folder.path, index):
            _read_rows(folder.path / rows_name(index), sizes=sizes, lengths=lengths)
    return FolderDescription(
        run=folder.run.to_json(),
        complete=folder.manifest is not None,
        num_shards=len(folder.entries),
        counts=folder.counts,
        bytes={name: sizes[name] for name in ("rows", *VECTOR_COLUMNS, "_m3") if name in sizes},
        token_histogram=dict(sorted(lengths.items())),
        metrics=read_metrics(folder.path),
    )


def _file_bytes(entry: DoneEntry) -> Counter[str]:
    outputs = {folder: output for output, folder in VECTOR_COLUMNS.items()}
    sizes: Counter[str] = Counter()
    for record in entry.files:
        top = record.name.partition("/")[0]
        sizes[outputs.get(top, top)] += record.length
    return sizes


def _read_rows(path: Path, *, sizes: Counter[str], lengths: Counter[int]) -> None:
    """Count rows by length, and move the bytes of vector columns from "rows" to their outputs."""
    columns = [*VECTOR_COLUMNS.items(), ("colbert", SCALES_COLUMN)]
    with pq.ParquetFile(path) as file:
        tokens = file.read(columns=["num_tokens"], use_threads=False).column("num_tokens").to_numpy()
        metadata = file.metadata
        for output, column in columns:
            if column in file.schema_arrow.names:
                moved = sum(
                    chunk.total_compressed_size
                    for group in range(metadata.num_row_groups)
                    for chunk in map(metadata.row_group(group).column, range(metadata.num_columns))
                    if chunk.path_in_schema.partition(".")[0] == column
                )
                sizes[output] += moved
                sizes["rows"] -= moved
    if len(tokens):
        powers, counts = np.unique(np.ceil(np.log2(tokens)).astype(np.int64), return_counts=True)
        lengths.update({1 << int(power): int(count) for power, count in zip(powers, counts, strict=True)})


def read_id_hashes(root: Path, shards: Iterable[int]) -> dict[int, NDArray[np.int64]]:
    """Read the hashes of the documents' ids, by shard."""
    return {
        index: np.concatenate([np.empty(0, np.int64), *(hashed for _, hashed in iter_ids(root, [index]))])
        for index in shards
    }


def iter_ids(root: Path, shards: Iterable[int]) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """Yield the ids of documents as Arrow columns, with their hashes, which are valid in this process only."""
    for index in shards:
        with reading(root, index):
            file = pq.ParquetFile(root / rows_name(index))
        with file:
            for group in range(file.num_row_groups):
                with reading(root, index):
                    table = file.read_row_group(group, columns=["id", "chunk_index"], use_threads=False)
                    ids = table.column("id").take(np.flatnonzero(table.column("chunk_index").to_numpy() == 0))
                    hashes = hash_ids(ids)
                yield ids, hashes

"""What is in an output folder: totals, bytes on disk of each output, how long its rows are. Reads no vectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from m3cli.records import DoneEntry, ShardCounts
from m3cli.store.layout import SCALES_COLUMN, VECTOR_COLUMNS, rows_name
from m3cli.store.reader import OutputFolder, check_lengths
from m3cli.store.reading import reading


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderDescription:
    """What `m3 info` shows."""

    run: dict[str, Any]
    "members of run.json"
    complete: bool
    num_shards: int
    "done so far"
    counts: ShardCounts
    bytes: dict[str, int]
    '"rows", "dense", "sparse", "colbert" as far as they are there, and "_m3" for hashes and skipped rows'
    token_histogram: dict[int, int]
    "rows by length: a key k counts rows of k/2 < num_tokens <= k, k a power of two, ascending"


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

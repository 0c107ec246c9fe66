"""Check the columns of a shard's rows other than vectors, one row group at a time.

The chunks of a document are consecutive and in order; its own row, chunk_index -1, may follow them. A merged row is the
only one of its document. The last row of a row group is kept for the next one. A check is a mask over a row group; the
message names the first row that fails and the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.records import ShardCounts
from m3cli.store.documents import reading
from m3cli.store.layout import ROW_COLUMNS, rows_name

Mask = NDArray[np.bool_]
MIN_TOKENS = 2  # <s> and </s>


def name_rows(bad: Mask, *, first_row: int, what: str) -> list[str]:
    """Return a message that names the first failing row and the number of failing rows, or none."""
    count = int(np.count_nonzero(bad))
    if not count:
        return []
    others = f" (and {count - 1:,} more)" if count > 1 else ""
    return [f"row {first_row + int(np.argmax(bad)):,}{others}: {what}"]


class RowsCheck:
    """Check of a shard's rows, row group by row group."""

    def __init__(self, *, max_length: int, merged: bool) -> None:
        self._max_length = max_length
        self._merged = merged
        self._previous: pa.Table | None = None
        self.counts = ShardCounts()
        self.id_hashes: list[NDArray[np.int64]] = []
        "of each document's id; valid in this process only"

    def check(self, rows: pa.Table) -> list[str]:
        """Check the next rows; return what is wrong."""
        names = [name for name, _ in ROW_COLUMNS]
        rows = rows.select(names).combine_chunks()
        found = [f"column {name} has nulls" for name in names if rows.column(name).null_count]
        if found or not rows.num_rows:
            return found
        first_row = self.counts.chunks
        columns = {name: rows.column(name).to_numpy() for name in names if name != "id"}
        found += self._check_each(columns, first_row)
        found += self._check_order(rows, first_row)
        self.counts += ShardCounts(
            chunks=rows.num_rows,
            tokens=int(columns["num_tokens"][columns["chunk_index"] >= 0].sum(dtype=np.int64)),
            truncated=int(columns["truncated"].sum()),
        )
        self._previous = rows.slice(rows.num_rows - 1)
        return found

    def finish(self, counts: ShardCounts) -> list[str]:
        """Compare the sums with those of the done entry."""
        found = []
        if self._previous is not None and not _ends_document(self._previous)[-1]:
            found.append("the last document is incomplete")
        for name in ("documents", "chunks", "tokens", "truncated"):
            actual, expected = getattr(self.counts, name), getattr(counts, name)
            if actual != expected:
                found.append(f"{actual:,} {name}, the done entry counts {expected:,}")
        return found

    def _check_each(self, columns: dict[str, Any], first_row: int) -> list[str]:
        tokens, start, end = columns["num_tokens"], columns["char_start"], columns["char_end"]
        index, number = columns["chunk_index"], columns["num_chunks"]
        limit = f"num_tokens is not between {MIN_TOKENS} and {self._max_length:,}"
        long = (tokens > self._max_length) & (index >= 0) & (not self._merged)
        several = (number > 1) & self._merged
        return [
            *name_rows((tokens < MIN_TOKENS) | long, first_row=first_row, what=limit),
            *name_rows(several, first_row=first_row, what="num_chunks is not 1 in a folder of merged documents"),
            *name_rows((start < 0) | (end < start), first_row=first_row, what="char_end before char_start"),
            *name_rows((index < -1) | (index >= number), first_row=first_row, what="chunk_index not below num_chunks"),
        ]

    def _check_order(self, rows: pa.Table, first_row: int) -> list[str]:
        """Compare each row with the previous one."""
        known = self._previous is not None
        both = pa.concat_tables([self._previous, rows]).combine_chunks() if self._previous is not None else rows
        index, number = both.column("chunk_index").to_numpy(), both.column("num_chunks").to_numpy()
        ids = both.column("id")
        same = pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy().astype(np.bool_)
        next_chunk = (index[1:] == index[:-1] + 1) & (index[:-1] >= 0)
        own_row = (index[1:] == -1) & (index[:-1] == number[:-1] - 1)
        continues = (next_chunk | own_row) & (number[1:] == number[:-1]) & same
        begins = index[1:] == 0
        wrong = ~continues & ~(begins & _ends_document(both)[:-1])
        first_begins = np.array([index[0] == 0]) if not known else np.empty(0, np.bool_)
        starts = np.concatenate([first_begins, ~continues])
        self.counts += ShardCounts(documents=int(np.count_nonzero(starts)))
        own = both if not known else both.slice(1)
        self.id_hashes.append(hash_ids(own.column("id").filter(pa.array(starts))))
        second = first_row if known else first_row + 1
        return [
            *name_rows(~first_begins, first_row=first_row, what="the first document does not start with chunk 0"),
            *name_rows(wrong, first_row=second, what="chunk_index or num_chunks does not follow from the previous row"),
            *name_rows(continues & _moves_back(both), first_row=second, what="span before the previous chunk's"),
        ]


def _ends_document(rows: pa.Table) -> Mask:
    index = rows.column("chunk_index").to_numpy()
    ends: Mask = (index == rows.column("num_chunks").to_numpy() - 1) | (index == -1)
    return ends


def _moves_back(rows: pa.Table) -> Mask:
    """Tell which rows after the first start or end before the previous one."""
    start, end = rows.column("char_start").to_numpy(), rows.column("char_end").to_numpy()
    later: Mask = (rows.column("chunk_index").to_numpy()[1:] > 0) & ((np.diff(start) < 0) | (np.diff(end) < 0))
    return later


def hash_ids(ids: Any) -> NDArray[np.int64]:
    """Hash ids to 64 bits; ids of a folder are compared by these 8 bytes."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateIds:
    """Number and examples of duplicate ids."""

    count: int
    "ids that occur more than once"
    examples: tuple[str, ...]


def find_duplicate_ids(root: Path, hashes: Mapping[int, NDArray[np.int64]]) -> DuplicateIds:
    """Find ids of more than one document, from the 64-bit hash of each document's id, by shard."""
    together = np.sort(np.concatenate([np.empty(0, np.int64), *hashes.values()]))
    twice = np.unique(together[1:][together[1:] == together[:-1]])
    examples: list[str] = []
    for wanted in twice[:NUM_EXAMPLES]:
        shard = next(shard for shard, found in hashes.items() if (found == wanted).any())
        examples += _look_up(root, shard, wanted)
    return DuplicateIds(count=len(twice), examples=tuple(examples))


def _look_up(root: Path, shard: int, wanted: np.int64) -> list[str]:
    with reading(root, shard), pq.ParquetFile(root / rows_name(shard)) as file:
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["id"], use_threads=False).column("id")
            found = np.flatnonzero(hash_ids(ids) == wanted)
            if len(found):
                return [ids[int(found[0])].as_py()]
    return []

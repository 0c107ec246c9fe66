"""Where documents lie in a folder by their ids: the id column is streamed, and only wanted ids are remembered.

The rows of a small folder's id columns are kept for the next question, so that it is read once; a large folder's are
read again for each window of pairs, which costs little beside reading the vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from m3cli.records import Output
from m3cli.store.reader import OutputFolder, ShardArrays, iter_parts

KEPT_ROWS = 1_000_000
"rows of a folder up to which its ids are kept in memory"
_COLUMNS = ("id", "chunk_index", "num_chunks", "num_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRows:
    """The rows of some documents, F of them, in the folder's order."""

    wanted: NDArray[np.int64]
    "[F] which of the wanted ids"
    shard: NDArray[np.int64]
    "[F]"
    row: NDArray[np.int64]
    "[F] in the shard"
    chunk_index: NDArray[np.int64]
    "[F]"
    num_tokens: NDArray[np.int64]
    "[F]"
    duplicates: int
    "wanted ids that name several documents; the first of each is given"


class RowLookup:
    """Finds rows of a folder by id."""

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._kept: list[tuple[int, int, pa.Table]] | None = None

    def find(self, ids: Sequence[str]) -> FoundRows:
        """Return the rows of the documents with these ids, which are distinct."""
        values = pa.array(ids, pa.string())
        parts: list[NDArray[np.int64]] = []
        for shard, first, table in self._tables():
            wanted = pc.index_in(table.column("id"), value_set=values)
            hits = np.flatnonzero(pc.is_valid(wanted).to_numpy(zero_copy_only=False))
            if len(hits):
                found = wanted.combine_chunks().take(pa.array(hits)).to_numpy(zero_copy_only=False)
                columns = [table.column(name).to_numpy()[hits] for name in _COLUMNS[1:]]
                parts.append(np.stack([found, np.full(len(hits), shard), hits + first, *columns]).astype(np.int64))
        return _first_documents(np.concatenate(parts, axis=1) if parts else np.empty((6, 0), np.int64))

    def _tables(self) -> Iterator[tuple[int, int, pa.Table]]:
        if self._kept is None and self._folder.counts.chunks <= KEPT_ROWS:
            self._kept = list(self._read())
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[tuple[int, int, pa.Table]]:
        for part in iter_parts(self._folder, outputs=(), columns=_COLUMNS):
            rows = part.embeddings.rows
            yield part.shard, int(rows[0]) if len(rows) else 0, part.rows


def _first_documents(rows: NDArray[np.int64]) -> FoundRows:
    """Keep the first document of each id, and of it the rows of its chunks; its own row only if there is no other."""
    wanted, shard, row, chunk_index, num_chunks, num_tokens = rows
    order = np.lexsort((row, shard, wanted))
    grouped = wanted[order]
    starts = np.flatnonzero(np.diff(grouped, prepend=-1))
    group = np.cumsum(np.diff(grouped, prepend=-1) != 0) - 1
    # A chunk that comes a second time, or belongs to a document of another length, is another document's.
    first_length = num_chunks[order][starts][group] if len(starts) else num_chunks[order]
    _, first_seen = np.unique(np.stack([grouped, chunk_index[order]]), axis=1, return_index=True)
    mine = np.zeros(len(order), np.bool_)
    mine[first_seen] = True
    mine &= num_chunks[order] == first_length
    duplicates = len(np.unique(grouped[~mine]))
    chunks = chunk_index[order] >= 0
    has_chunks = np.zeros(len(starts), np.bool_)
    has_chunks[group[mine & chunks]] = True
    mine &= chunks | ~has_chunks[group]
    kept = np.sort(order[mine])
    return FoundRows(
        wanted=wanted[kept],
        shard=shard[kept],
        row=row[kept],
        chunk_index=chunk_index[kept],
        num_tokens=num_tokens[kept],
        duplicates=duplicates,
    )


def read_parts(folder: OutputFolder, shards: Collection[int], *, outputs: Sequence[Output]) -> Iterator[ShardArrays]:
    """Read the vectors of some shards, part by part, in order."""
    wanted: dict[int, Any] = {shard: folder.entries[shard] for shard in sorted(shards)}
    yield from iter_parts(replace(folder, entries=wanted), outputs=outputs, columns=("num_tokens",))

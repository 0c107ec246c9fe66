"""Which texts a folder has vectors of, by their hashes, and those vectors: what an increment takes over from it.

24 bytes a document are held, and of the vectors one part of a shard at a time, in either format. Nothing is taken from
a file whose hash is not that of its done entry: each is hashed once, before it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.errors import DamageFound
from m3cli.records import Chunks, Document, DoneEntry, Origins, Output
from m3cli.store.layout import hashes_name
from m3cli.store.reader import OutputFolder, ShardArrays, iter_parts, read_shard
from m3cli.store.reading import name_repair, reading
from m3cli.store.verify.files import check_files

SHARDS_KEPT = 4
"old shards whose rows are remembered, without their vectors"
_COLUMNS = ("chunk_index", "num_chunks", "char_start", "char_end", "truncated", "num_tokens")


class TextIndex:
    """The texts of an older folder's finished shards."""

    def __init__(self, folder: OutputFolder, *, outputs: Sequence[Output]) -> None:
        self._folder = folder
        self._outputs = outputs
        self._read_rows = lru_cache(maxsize=SHARDS_KEPT)(self._read_shard)
        self._checked: set[int] = set()
        hashes = [_read_hashes(folder, index) for index in folder.entries]
        together = np.concatenate([np.empty((0, 2), np.uint64), *hashes])
        numbers = [np.arange(len(part), dtype=np.int32) for part in hashes]
        order = np.lexsort((together[:, 1], together[:, 0]))
        self._hashes = together[order]
        self._shard = np.repeat(np.array(list(folder.entries), np.int32), [len(part) for part in hashes])[order]
        self._document = np.concatenate([np.empty(0, np.int32), *numbers])[order]

    def find(self, documents: Sequence[Document]) -> tuple[Chunks, Origins]:
        """Return the rows of the documents whose text is there, their token ids left at 0, and where they are."""
        known, shards, places = self._look_up(documents)
        parts = [np.empty((1 + len(_COLUMNS), 0), np.int64)]
        origins = [np.empty((2, 0), np.int64)]
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            starts, columns = self._read_rows(shard)
            begins = starts[places[mine]]
            lengths = starts[places[mine] + 1] - begins
            ends = np.cumsum(lengths)
            rows = np.arange(lengths.sum()) + np.repeat(begins - ends + lengths, lengths)
            parts.append(np.stack([np.repeat(known[mine], lengths), *(column[rows] for column in columns)]))
            origins.append(np.stack([np.full(len(rows), shard), rows]))
        table, origin = np.concatenate(parts, axis=1), np.concatenate(origins, axis=1)
        order = np.argsort(table[0], kind="stable")
        document, chunk_index, num_chunks, char_start, char_end, truncated, num_tokens = table[:, order]
        cu_seqlens = np.concatenate(([0], np.cumsum(num_tokens)))
        chunks = Chunks(
            input_ids=np.zeros(cu_seqlens[-1], np.int32),
            cu_seqlens=cu_seqlens,
            document=document,
            chunk_index=chunk_index.astype(np.int32),
            num_chunks=num_chunks.astype(np.int32),
            char_start=char_start,
            char_end=char_end,
            truncated=truncated.astype(np.bool_),
            num_repeated=np.zeros(len(document), np.int32),
        )
        return chunks, Origins(rows=np.arange(len(document)), shard=origin[0, order], row=origin[1, order])

    def _look_up(self, documents: Sequence[Document]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return which documents' text is there, and of each the shard and its number in it."""
        if not len(self._hashes):
            return (np.empty(0, np.int64),) * 3
        wanted = np.array([document.text_hash for document in documents], np.uint64).reshape(-1, 2)
        place = np.minimum(np.searchsorted(self._hashes[:, 0], wanted[:, 0]), len(self._hashes) - 1)
        known = np.flatnonzero((self._hashes[place] == wanted).all(axis=1))
        return known, self._shard[place[known]].astype(np.int64), self._document[place[known]].astype(np.int64)

    def _read_shard(self, shard: int) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """Return the first row of each document of a shard and the end, and the columns that tell of its rows."""
        if shard not in self._checked:
            _check_hashes(self._folder, self._folder.entries[shard])
            self._checked.add(shard)
        table = read_shard(self._folder, shard, outputs=(), columns=_COLUMNS).rows
        columns = [table.column(name).to_numpy(zero_copy_only=False).astype(np.int64) for name in _COLUMNS]
        index = columns[0]
        starts = np.flatnonzero(index == 0)
        if len(starts) != self._folder.entries[shard].counts.documents:
            raise DamageFound(f"{self._folder.path}: the rows of shard {shard} are not those of its documents")
        return np.append(starts, len(index)), columns

    def read(self, origins: Origins) -> Iterator[tuple[ShardArrays, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield parts of the folder, with the places in them that are wanted, and the rows of ours those are."""
        for shard in np.unique(origins.shard).tolist():
            mine = origins.shard == shard
            rows, wanted = origins.rows[mine], origins.row[mine]
            entries: dict[int, Any] = {shard: self._folder.entries[shard]}
            parts = iter_parts(replace(self._folder, entries=entries), outputs=self._outputs, columns=("num_tokens",))
            for part in parts:
                first, last = int(part.embeddings.rows[0]), int(part.embeddings.rows[-1])
                here = (wanted >= first) & (wanted <= last)
                if here.any():
                    yield part, wanted[here] - first, rows[here]


def _check_hashes(folder: OutputFolder, entry: DoneEntry) -> None:
    for fault in check_files(folder.path, entry):
        raise DamageFound(f"{folder.path / fault.file} {fault.what}; {name_repair(folder.path)}")


def _read_hashes(folder: OutputFolder, index: int) -> NDArray[np.uint64]:
    entry = folder.entries[index]
    documents = entry.counts.documents
    _check_hashes(folder, replace(entry, files=tuple(each for each in entry.files if each.name == hashes_name(index))))
    with reading(folder.path, index):
        hashes: NDArray[np.uint64] = np.load(folder.path / hashes_name(index), allow_pickle=False)
        if hashes.shape != (documents, 2) or hashes.dtype != np.uint64:
            raise ValueError(f"{hashes_name(index)} holds {hashes.dtype}{list(hashes.shape)}")
        return hashes

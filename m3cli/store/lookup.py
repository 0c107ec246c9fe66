"""Rows of a folder as search knows them: by place in the corpus and by document, in parts, and a few of them again.

A place is (shard << 32) + row, so places ascend as the corpus does. A document is all rows of one id: documents that
share an id are one here, and so are their chunks of one number, as the lines of a run could not tell them apart. Keys
are hashes of ids, good for this process; that two of 2^64 fall together in the list of one query is left to chance.
They are made for the rows that are asked for: most rows of a corpus are no hit, and hashing is dearer than scoring.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from m3cli.errors import DamageFound, UsageError
from m3cli.records import Chunks, Document, DoneEntry, Embeddings, Origins, Output
from m3cli.store.documents import name_repair, reading
from m3cli.store.layout import TEXT_COLUMN, hashes_name
from m3cli.store.reader import OutputFolder, ShardArrays, iter_parts, read_shard
from m3cli.store.verify.ledger import check_files
from m3cli.store.verify.rows import hash_ids

Rows = NDArray[np.int64]
_ROW_BITS = 32
_PLACED = ("id", "chunk_index")
HASH_MULTIPLIER = np.int64(-7046029254386353131)
"2^64 over the golden ratio: what a chunk's number is multiplied with before it is mixed into the hash of its id"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Some consecutive rows of a folder; R of them."""

    embeddings: Embeddings
    first: int
    "place of the first row, to be found or not"
    places: Rows
    "[R]; negative for a row that is not to be found: a document's own row beside its chunks"
    ids: Any
    "pyarrow column of R strings"
    chunk_index: Rows | None
    "[R]; None where documents are searched for"

    def find_keys(self, rows: Rows) -> Rows:
        """Return [N] keys of N rows of the part: of the document, or of the chunk where chunks are searched for."""
        distinct, numbers = np.unique(rows, return_inverse=True)
        keys = hash_ids(self.ids.take(pa.array(distinct)))
        if self.chunk_index is not None:
            keys ^= self.chunk_index[distinct] * HASH_MULTIPLIER
        return keys[numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMetadata:
    """What some rows say of themselves; F of them, by place, ascending."""

    ids: tuple[str, ...]
    chunk_index: Rows
    "[F]"
    char_start: Rows | None
    "[F]; None where it was not asked for, as the two below"
    char_end: Rows | None
    "[F]"
    texts: tuple[str, ...] | None
    "[F] the first Unicode code points of the kept text"


def iter_blocks(
    folder: OutputFolder, *, outputs: Sequence[Output], chunks: bool, wanted: Rows | None = None
) -> Iterator[RowBlock]:
    """Read a folder part by part.

    Args:
        folder: the folder.
        outputs: vectors to read.
        chunks: a hit is a chunk, not a document.
        wanted: places that matter, ascending; parts without any are passed over. None: all.
    """
    by_shard = None if wanted is None else split_places(wanted)
    for part in iter_parts(folder, outputs=outputs, columns=_PLACED, wanted=by_shard):
        yield _place_rows(folder, part, chunks=chunks)


def _place_rows(folder: OutputFolder, part: ShardArrays, *, chunks: bool) -> RowBlock:
    places = (part.shard << _ROW_BITS) + part.embeddings.rows
    chunk_index = part.rows.column("chunk_index").to_numpy().astype(np.int64)
    first = int(places[0])
    if folder.run.config.long_docs == "both":
        places = np.where(chunk_index < 0, -1, places)
    return RowBlock(
        embeddings=part.embeddings,
        first=first,
        places=places,
        ids=part.rows.column("id"),
        chunk_index=chunk_index if chunks else None,
    )


def find_rows(folder: OutputFolder, keys: Rows, *, chunks: bool) -> tuple[Rows, Rows]:
    """Return [F] the places of all rows with one of these keys, ascending, and [F] their keys."""
    found: list[tuple[Rows, Rows]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    distinct = np.unique(keys)
    for part in iter_blocks(folder, outputs=(), chunks=chunks):
        theirs = part.find_keys(np.arange(len(part.places)))
        hits = np.isin(theirs, distinct) & (part.places >= 0)
        found.append((part.places[hits], theirs[hits]))
    places, owners = zip(*found, strict=True)
    return np.concatenate(places), np.concatenate(owners)


def read_metadata(folder: OutputFolder, places: Rows, *, spans: bool, length: int = 0) -> RowMetadata:
    """Read what rows say of themselves.

    Args:
        folder: the folder.
        places: of the rows, distinct and ascending.
        spans: read where the rows are in their documents, too.
        length: of the kept text the first so many code points; 0: none.
    """
    columns = ["id", "chunk_index", *(["char_start", "char_end"] if spans else []), *([TEXT_COLUMN] if length else [])]
    found: list[pa.Table] = []
    by_shard = split_places(places)
    for part in iter_parts(folder, outputs=(), columns=columns, wanted=by_shard):
        rows = part.embeddings.rows
        mine = by_shard[part.shard]
        first, last = np.searchsorted(mine, [rows[0], rows[-1] + 1])
        table = part.rows.select(columns).take(pa.array(mine[first:last] - rows[0]))
        if length:
            table = table.set_column(
                len(columns) - 1, TEXT_COLUMN, pc.utf8_slice_codeunits(table.column(TEXT_COLUMN), 0, length)
            )
        found.append(table)
    table = pa.concat_tables(found) if found else pa.table({name: pa.array([], pa.int64()) for name in columns})

    def read_numbers(name: str) -> Rows | None:
        return table.column(name).to_numpy().astype(np.int64) if name in columns else None

    chunk_index = read_numbers("chunk_index")
    assert chunk_index is not None
    return RowMetadata(
        ids=tuple(table.column("id").to_pylist()),
        chunk_index=chunk_index,
        char_start=read_numbers("char_start"),
        char_end=read_numbers("char_end"),
        texts=tuple(table.column(TEXT_COLUMN).to_pylist()) if length else None,
    )


def iter_texts(folder: OutputFolder, *, chunks: bool) -> Iterator[tuple[list[str], Rows, Rows]]:
    """Yield the kept texts of rows that are to be found, with their places and keys, part by part."""
    for part in iter_parts(folder, outputs=(), columns=(*_PLACED, TEXT_COLUMN)):
        placed = _place_rows(folder, part, chunks=chunks)
        found = np.flatnonzero(placed.places >= 0)
        texts = part.rows.column(TEXT_COLUMN).take(pa.array(found)).to_pylist()
        yield texts, placed.places[found], placed.find_keys(found)


def split_places(places: Rows) -> dict[int, Rows]:
    """Return ascending places as rows by shard."""
    shards, starts = np.unique(places >> _ROW_BITS, return_index=True)
    bounds = np.append(starts, len(places))
    rows = places & ((1 << _ROW_BITS) - 1)
    return {int(shard): rows[bounds[turn] : bounds[turn + 1]] for turn, shard in enumerate(shards)}


KEPT_ROWS = 1_000_000
"rows of a folder up to which its ids are kept in memory"
_ROW_COLUMNS = ("id", "chunk_index", "num_chunks", "num_tokens")


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
                columns = [table.column(name).to_numpy()[hits] for name in _ROW_COLUMNS[1:]]
                parts.append(np.stack([found, np.full(len(hits), shard), hits + first, *columns]).astype(np.int64))
        return _first_documents(np.concatenate(parts, axis=1) if parts else np.empty((6, 0), np.int64))

    def _tables(self) -> Iterator[tuple[int, int, pa.Table]]:
        if self._kept is None and self._folder.counts.chunks <= KEPT_ROWS:
            self._kept = list(self._read())
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[tuple[int, int, pa.Table]]:
        for part in iter_parts(self._folder, outputs=(), columns=_ROW_COLUMNS):
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


SHARDS_KEPT = 4
"old shards whose rows are remembered, without their vectors"
_SPAN_COLUMNS = ("chunk_index", "num_chunks", "char_start", "char_end", "truncated", "num_tokens")


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
        parts = [np.empty((1 + len(_SPAN_COLUMNS), 0), np.int64)]
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
        table = read_shard(self._folder, shard, outputs=(), columns=_SPAN_COLUMNS).rows
        columns = [table.column(name).to_numpy(zero_copy_only=False).astype(np.int64) for name in _SPAN_COLUMNS]
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


_TEXT_COLUMNS = ("id", "chunk_index", "char_start", "char_end", TEXT_COLUMN)


@dataclass(slots=True)
class _Document:
    """A document whose rows are being read."""

    id: str
    text: str = ""
    "of the chunks so far"
    chunks: int = 0
    end: int = 0

    def add(self, *, char_start: int, char_end: int, text: str) -> None:
        """Add the next row."""
        gap = " " if self.chunks and char_start > self.end else ""
        self.text += gap + text[max(0, self.end - char_start) :]
        self.chunks += 1
        self.end = char_end

    def continues(self, document_id: str, chunk_index: int) -> bool:
        """Whether a row is this document's."""
        return self.id == document_id and chunk_index == self.chunks


def iter_passages(folder: OutputFolder, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the id and text of each wanted document, in the folder's order.

    A document's own row, which `--long-docs both` puts behind its chunks, says nothing new.

    Raises:
        UsageError: the folder has kept no texts.
    """
    if not folder.run.config.keep_text:
        raise UsageError(
            f"{folder.path.name} has kept no texts; give the corpus itself, or encode it again with --keep-text"
        )
    values = pa.array(sorted(wanted), pa.string())
    document: _Document | None = None
    for part in iter_parts(folder, outputs=(), columns=_TEXT_COLUMNS):
        named = pc.is_in(part.rows.column("id"), value_set=values).to_numpy(zero_copy_only=False)
        hits = np.flatnonzero(named & (part.rows.column("chunk_index").to_numpy() >= 0))
        for row in part.rows.take(pa.array(hits)).to_pylist():
            name, index = row["id"], row["chunk_index"]
            if document is None or not document.continues(name, index):
                if document is not None:
                    yield document.id, document.text
                document = _Document(id=name)
            document.add(char_start=row["char_start"], char_end=row["char_end"], text=row[TEXT_COLUMN])
    if document is not None:
        yield document.id, document.text

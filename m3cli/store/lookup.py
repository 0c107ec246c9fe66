"""Find and read single rows of a folder: by position, by id, by content hash.

The position of a row is (shard << 32) + row number, so positions ascend in corpus order. A document is all rows of one
id; documents that share an id are therefore one, as in a TREC run. Keys are 64-bit hashes of ids, valid in this process
only; a collision within the list of one query is ignored. Only the requested rows are hashed, because hashing costs
more than scoring.
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
from m3cli.records import Chunks, Document, DoneEntry, Embeddings, Origins, Output, is_among
from m3cli.store.documents import name_repair, reading
from m3cli.store.layout import TEXT_COLUMN, hashes_name
from m3cli.store.reader import OutputFolder, ShardArrays, iter_parts, read_shard
from m3cli.store.verify.ledger import check_files
from m3cli.store.verify.rows import hash_ids

Rows = NDArray[np.int64]
_ROW_BITS = 32
_BLOCK_COLUMNS = ("id", "chunk_index")
HASH_MULTIPLIER = np.int64(-7046029254386353131)
"2^64 divided by the golden ratio; mixes the number of a chunk into the hash of its id"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """R consecutive rows of a folder."""

    embeddings: Embeddings
    first: int
    "position of the first row, searchable or not"
    positions: Rows
    "[R]; negative for a row that is not searched: a document's own row after its chunks"
    ids: Any
    "pyarrow column of R strings"
    chunk_index: Rows | None
    "[R]; None if hits are documents"

    def find_keys(self, rows: Rows) -> Rows:
        """Return the keys [N] of N rows of the block: of their documents, or of their chunks if hits are chunks."""
        distinct, numbers = np.unique(rows, return_inverse=True)
        keys = hash_ids(self.ids.take(_to_arrow(distinct)))
        if self.chunk_index is not None:
            keys ^= self.chunk_index[distinct] * HASH_MULTIPLIER
        return keys[numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMetadata:
    """Ids, chunk indices, spans and texts of F rows, by ascending position."""

    ids: tuple[str, ...]
    chunk_index: Rows
    "[F]"
    char_start: Rows | None
    "[F]; None if it was not requested, like the two below"
    char_end: Rows | None
    "[F]"
    texts: tuple[str, ...] | None
    "[F] start of the kept text, in Unicode code points"


def iter_blocks(
    folder: OutputFolder, *, outputs: Sequence[Output], chunks: bool, wanted: Rows | None = None
) -> Iterator[RowBlock]:
    """Read a folder block by block.

    Args:
        folder: the folder.
        outputs: vectors to read.
        chunks: a hit is a chunk, not a document.
        wanted: ascending positions; blocks without any are skipped. None: all.
    """
    by_shard = None if wanted is None else split_positions(wanted)
    for part in iter_parts(folder, outputs=outputs, columns=_BLOCK_COLUMNS, wanted=by_shard):
        yield _to_block(folder, part, chunks=chunks)


def _to_block(folder: OutputFolder, part: ShardArrays, *, chunks: bool) -> RowBlock:
    positions = (part.shard << _ROW_BITS) + part.embeddings.rows
    chunk_index = _to_numpy(part.rows.column("chunk_index"))
    first = int(positions[0])
    if folder.run.config.long_docs == "both":
        positions = np.where(chunk_index < 0, -1, positions)
    return RowBlock(
        embeddings=part.embeddings,
        first=first,
        positions=positions,
        ids=part.rows.column("id"),
        chunk_index=chunk_index if chunks else None,
    )


def find_rows(folder: OutputFolder, keys: Rows, *, chunks: bool) -> tuple[Rows, Rows]:
    """Return the ascending positions [F] of all rows with one of these keys, and their keys [F]."""
    found: list[tuple[Rows, Rows]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    distinct = np.unique(keys)
    for part in iter_blocks(folder, outputs=(), chunks=chunks):
        part_keys = part.find_keys(np.arange(len(part.positions)))
        hits = is_among(part_keys, distinct) & (part.positions >= 0)
        found.append((part.positions[hits], part_keys[hits]))
    positions, owners = zip(*found, strict=True)
    return np.concatenate(positions), np.concatenate(owners)


def read_metadata(folder: OutputFolder, positions: Rows, *, spans: bool, length: int = 0) -> RowMetadata:
    """Read ids and chunk indices of rows.

    Args:
        folder: the folder.
        positions: of the rows, distinct and ascending.
        spans: also read the rows' spans in their documents.
        length: code points to read of the kept text; 0: none.
    """
    columns = ["id", "chunk_index", *(["char_start", "char_end"] if spans else []), *([TEXT_COLUMN] if length else [])]
    found: list[pa.Table] = []
    by_shard = split_positions(positions)
    for part in iter_parts(folder, outputs=(), columns=columns, wanted=by_shard):
        rows = part.embeddings.rows
        wanted = by_shard[part.shard]
        first, last = np.searchsorted(wanted, [rows[0], rows[-1] + 1])
        table = part.rows.select(columns).take(_to_arrow(wanted[first:last] - rows[0]))
        if length:
            table = table.set_column(
                len(columns) - 1, TEXT_COLUMN, pc.utf8_slice_codeunits(table.column(TEXT_COLUMN), 0, length)
            )
        found.append(table)
    table = pa.concat_tables(found) if found else pa.table({name: pa.array([], pa.int64()) for name in columns})

    def read_numbers(name: str) -> Rows | None:
        return _to_numpy(table.column(name)) if name in columns else None

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
    """Yield the kept texts of searchable rows with their positions and keys, row group by row group."""
    for part in iter_parts(folder, outputs=(), columns=(*_BLOCK_COLUMNS, TEXT_COLUMN)):
        block = _to_block(folder, part, chunks=chunks)
        found = np.flatnonzero(block.positions >= 0)
        texts = part.rows.column(TEXT_COLUMN).take(pa.array(found)).to_pylist()
        yield texts, block.positions[found], block.find_keys(found)


def _to_numpy(column: Any) -> Rows:
    """Return integers without nulls as an array; pyarrow's own conversion imports pandas, half a second."""
    array = column.combine_chunks()
    values = np.frombuffer(array.buffers()[1] or b"", f"i{array.type.bit_width // 8}")
    return values[array.offset : array.offset + len(array)].astype(np.int64)


def _to_arrow(rows: Rows) -> Any:
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows, np.int64))])


def shards_of(positions: Rows) -> list[int]:
    """Return the shard of each position."""
    shards: list[int] = (positions >> _ROW_BITS).tolist()
    return shards


def split_positions(positions: Rows) -> dict[int, Rows]:
    """Return the row numbers of ascending positions, by shard."""
    shards, starts = np.unique(positions >> _ROW_BITS, return_index=True)
    bounds = np.append(starts, len(positions))
    rows = positions & ((1 << _ROW_BITS) - 1)
    return {int(shard): rows[bounds[number] : bounds[number + 1]] for number, shard in enumerate(shards)}


KEPT_ROWS = 1_000_000
"largest folder whose ids are kept in memory, in rows"
_ROW_COLUMNS = ("id", "chunk_index", "num_chunks", "num_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRows:
    """F rows of some documents, in the folder's order."""

    wanted: NDArray[np.int64]
    "[F] index of the wanted id"
    shard: NDArray[np.int64]
    "[F]"
    row: NDArray[np.int64]
    "[F] row number in the shard"
    chunk_index: NDArray[np.int64]
    "[F]"
    num_tokens: NDArray[np.int64]
    "[F]"
    duplicates: int
    "wanted ids of several documents; the first one of each is used"


class RowLookup:
    """Find rows of a folder by id."""

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._kept: list[tuple[int, int, pa.Table]] | None = None

    def find(self, ids: Sequence[str]) -> FoundRows:
        """Return the rows of the documents with these distinct ids."""
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
    """Keep the chunks of the first document of each id; its own row only if it has no chunks."""
    wanted, shard, row, chunk_index, num_chunks, num_tokens = rows
    order = np.lexsort((row, shard, wanted))
    grouped = wanted[order]
    starts = np.flatnonzero(np.diff(grouped, prepend=-1))
    group = np.cumsum(np.diff(grouped, prepend=-1) != 0) - 1
    # A chunk index that occurs again, or in a document of another length, belongs to another document.
    first_length = num_chunks[order][starts][group] if len(starts) else num_chunks[order]
    _, first_seen = np.unique(np.stack([grouped, chunk_index[order]]), axis=1, return_index=True)
    selected = np.zeros(len(order), np.bool_)
    selected[first_seen] = True
    selected &= num_chunks[order] == first_length
    duplicates = len(np.unique(grouped[~selected]))
    chunks = chunk_index[order] >= 0
    has_chunks = np.zeros(len(starts), np.bool_)
    has_chunks[group[selected & chunks]] = True
    selected &= chunks | ~has_chunks[group]
    kept = np.sort(order[selected])
    return FoundRows(
        wanted=wanted[kept],
        shard=shard[kept],
        row=row[kept],
        chunk_index=chunk_index[kept],
        num_tokens=num_tokens[kept],
        duplicates=duplicates,
    )


def read_parts(folder: OutputFolder, shards: Collection[int], *, outputs: Sequence[Output]) -> Iterator[ShardArrays]:
    """Read the vectors of some shards in order, row group by row group."""
    wanted: dict[int, Any] = {shard: folder.entries[shard] for shard in sorted(shards)}
    yield from iter_parts(replace(folder, entries=wanted), outputs=outputs, columns=("num_tokens",))


SHARDS_KEPT = 4
"shards whose rows are kept in memory, without their vectors"
_SPAN_COLUMNS = ("chunk_index", "num_chunks", "char_start", "char_end", "truncated", "num_tokens")


class TextIndex:
    """Index of the texts in an earlier folder's finished shards, by content hash."""

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
        """Return the rows of the documents whose text is in the folder, with token ids 0, and where they are stored."""
        known, shards, numbers = self._look_up(documents)
        parts = [np.empty((1 + len(_SPAN_COLUMNS), 0), np.int64)]
        origins = [np.empty((2, 0), np.int64)]
        for shard in np.unique(shards).tolist():
            in_shard = shards == shard
            starts, columns = self._read_rows(shard)
            begins = starts[numbers[in_shard]]
            lengths = starts[numbers[in_shard] + 1] - begins
            ends = np.cumsum(lengths)
            rows = np.arange(lengths.sum()) + np.repeat(begins - ends + lengths, lengths)
            parts.append(np.stack([np.repeat(known[in_shard], lengths), *(column[rows] for column in columns)]))
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
        """Return which documents' texts are in the folder, their shards and their numbers in the shards."""
        if not len(self._hashes):
            return (np.empty(0, np.int64),) * 3
        wanted = np.array([document.text_hash for document in documents], np.uint64).reshape(-1, 2)
        position = np.minimum(np.searchsorted(self._hashes[:, 0], wanted[:, 0]), len(self._hashes) - 1)
        known = np.flatnonzero((self._hashes[position] == wanted).all(axis=1))
        return known, self._shard[position[known]].astype(np.int64), self._document[position[known]].astype(np.int64)

    def check_hashes(self, shard: int) -> None:
        """Raise DamageFound if a file of a shard is not what it was when it was written; each shard is read once."""
        if shard not in self._checked:
            _check_hashes(self._folder, self._folder.entries[shard])
            self._checked.add(shard)

    def _read_shard(self, shard: int) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """Return where the documents of a shard start, and the end; and the columns `_SPAN_COLUMNS`."""
        self.check_hashes(shard)
        table = read_shard(self._folder, shard, outputs=(), columns=_SPAN_COLUMNS).rows
        columns = [table.column(name).to_numpy(zero_copy_only=False).astype(np.int64) for name in _SPAN_COLUMNS]
        index = columns[0]
        starts = np.flatnonzero(index == 0)
        if len(starts) != self._folder.entries[shard].counts.documents:
            raise DamageFound(f"{self._folder.path}: the rows of shard {shard} are not those of its documents")
        return np.append(starts, len(index)), columns

    def read(self, origins: Origins) -> Iterator[tuple[ShardArrays, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield row groups of the folder, the indices of the wanted rows in them, and the rows of `origins`."""
        for shard in np.unique(origins.shard).tolist():
            in_shard = origins.shard == shard
            rows, wanted = origins.rows[in_shard], origins.row[in_shard]
            entries: dict[int, Any] = {shard: self._folder.entries[shard]}
            parts = iter_parts(replace(self._folder, entries=entries), outputs=self._outputs, columns=("num_tokens",))
            for part in parts:
                first, last = int(part.embeddings.rows[0]), int(part.embeddings.rows[-1])
                in_part = (wanted >= first) & (wanted <= last)
                if in_part.any():
                    yield part, wanted[in_part] - first, rows[in_part]


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
    """Document whose rows are being read."""

    id: str
    text: str = ""
    "of the chunks read so far"
    chunks: int = 0
    end: int = 0

    def add(self, *, char_start: int, char_end: int, text: str) -> None:
        """Add the next row."""
        gap = " " if self.chunks and char_start > self.end else ""
        self.text += gap + text[max(0, self.end - char_start) :]
        self.chunks += 1
        self.end = char_end

    def continues(self, document_id: str, chunk_index: int) -> bool:
        """Whether a row is the next one of this document."""
        return self.id == document_id and chunk_index == self.chunks


def iter_passages(folder: OutputFolder, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the id and text of each wanted document, in the folder's order.

    Raises:
        UsageError: the folder was encoded without `--keep-text`.
    """
    if not folder.run.config.keep_text:
        raise UsageError(
            f"{folder.path.name} has no texts; give the corpus itself, or encode it again with --keep-text"
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

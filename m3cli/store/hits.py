"""Rows of a folder as search knows them: by place in the corpus and by document, in parts, and a few of them again.

A place is (shard << 32) + row, so places ascend as the corpus does. A document is all rows of one id: documents that
share an id are one here, and so are their chunks of one number, as the lines of a run could not tell them apart. Keys
are hashes of ids, good for this process; that two of 2^64 fall together in the list of one query is left to chance.
They are made for the rows that are asked for: most rows of a corpus are no hit, and hashing is dearer than scoring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from m3cli.records import Embeddings, Output
from m3cli.store.layout import TEXT_COLUMN
from m3cli.store.reader import OutputFolder, ShardArrays, iter_parts
from m3cli.store.verify.rows import hash_ids

Rows = NDArray[np.int64]
_ROW_BITS = 32
_PLACED = ("id", "chunk_index")
_ODD = np.int64(-7046029254386353131)
"2^64 over the golden ratio: what a chunk's number is multiplied with before it is mixed into the hash of its id"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
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
            keys ^= self.chunk_index[distinct] * _ODD
        return keys[numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWords:
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


def iter_placed(
    folder: OutputFolder, *, outputs: Sequence[Output], chunks: bool, wanted: Rows | None = None
) -> Iterator[PlacedPart]:
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


def _place_rows(folder: OutputFolder, part: ShardArrays, *, chunks: bool) -> PlacedPart:
    places = (part.shard << _ROW_BITS) + part.embeddings.rows
    chunk_index = part.rows.column("chunk_index").to_numpy().astype(np.int64)
    first = int(places[0])
    if folder.run.config.long_docs == "both":
        places = np.where(chunk_index < 0, -1, places)
    return PlacedPart(
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
    for part in iter_placed(folder, outputs=(), chunks=chunks):
        theirs = part.find_keys(np.arange(len(part.places)))
        hits = np.isin(theirs, distinct) & (part.places >= 0)
        found.append((part.places[hits], theirs[hits]))
    places, owners = zip(*found, strict=True)
    return np.concatenate(places), np.concatenate(owners)


def read_words(folder: OutputFolder, places: Rows, *, spans: bool, length: int = 0) -> RowWords:
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
    return RowWords(
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

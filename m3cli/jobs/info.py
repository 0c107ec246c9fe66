"""`m3 info`: what is in a folder, or of one of its documents. Nothing is locked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m3cli.config import EncodeRequest
from m3cli.corpus.sources import find_sources
from m3cli.errors import ForeignFolder, UsageError
from m3cli.jobs.input_again import find_input, read_texts
from m3cli.jobs.run import Run, adopt_run, parse_run
from m3cli.store.describe import FolderDescription, describe
from m3cli.store.layout import TEXT_COLUMN
from m3cli.store.lookup import RowLookup
from m3cli.store.reader import OutputFolder, iter_parts, open_folder, read_shard

_log = logging.getLogger(__name__)

_COLUMNS = ("chunk_index", "num_chunks", "char_start", "char_end", "num_tokens", "truncated")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    """A row of a document: where it is in the document's text."""

    chunk_index: int
    num_chunks: int
    char_start: int
    "code points of title + title separator + text"
    char_end: int
    num_tokens: int
    truncated: bool
    text: str | None
    "None: not asked for"


def describe_folder(folder: str) -> FolderDescription:
    """Describe a finished or unfinished folder."""
    return describe(open_folder(Path(folder)))


def find_chunks(folder: str, document_id: str, *, text: bool = False, source: str | None = None) -> list[ChunkSpan]:
    """Return the rows of a document in their order; their text is the folder's, or else that of the input.

    Of several documents with the id it is the first, which a warning says.

    Args:
        folder: a folder that m3 encode wrote.
        document_id: the document's id.
        text: whether their text is wanted too.
        source: where the input is now; None: where it was.

    Raises:
        UsageError: there is no such document.
        CorpusError, ForeignFolder: the folder has no text, and the input is gone, or is another now.
    """
    opened = open_folder(Path(folder))
    found = RowLookup(opened).find([document_id])
    if not len(found.row):
        raise UsageError(f"{folder} has no document with id {document_id!r}")
    if found.duplicates:
        _log.warning("several documents have the id %r: this is the first of them", document_id)
    shard, rows = int(found.shard[0]), found.row
    table = read_shard(opened, shard, outputs=()).rows.take(rows)
    columns = [table.column(name).to_pylist() for name in _COLUMNS]
    starts, ends = columns[2], columns[3]
    texts: list[str | None] = [None] * len(rows)
    if text and TEXT_COLUMN in table.column_names:
        texts = table.column(TEXT_COLUMN).to_pylist()
    elif text:
        whole = _read_text(opened, shard, document_id, source=source)
        texts = [whole[start:end] for start, end in zip(starts, ends, strict=True)]
    return [
        ChunkSpan(**dict(zip(_COLUMNS, values, strict=True)), text=own)
        for *values, own in zip(*columns, texts, strict=True)
    ]


def _read_text(folder: OutputFolder, shard: int, document_id: str, *, source: str | None) -> str:
    assert folder.run is not None
    run, entry = _find_source(parse_run(folder.run), folder, source), folder.entries[shard]
    for text in read_texts(run, {shard}):
        if text.input_hash != entry.input_hash:
            raise ForeignFolder(f"{entry.source} has changed since {folder.path.name} was made from it: drop --text")
        for document in text.documents:
            if document.id == document_id:
                return document.text
    raise ForeignFolder(f"the input has no document {document_id!r} any more: drop --text")


def _find_source(run: Run, folder: OutputFolder, source: str | None) -> Run:
    if source is None:
        return find_input(run, folder.path, otherwise="say with --input where it is")
    sources = find_sources((source,), input_format="auto", stdin=None)
    return adopt_run(run, EncodeRequest(inputs=(source,)), sources=sources, out=folder.path.name)


def list_truncated(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield id, tokens and code points of what was encoded of each document that was cut short."""
    for part in iter_parts(
        open_folder(Path(folder)), outputs=(), columns=("id", "num_tokens", "char_end", "truncated")
    ):
        cut = part.rows.filter(part.rows.column("truncated"))
        names = ("id", "num_tokens", "char_end")
        yield from zip(*(cut.column(name).to_pylist() for name in names), strict=True)

"""`m3 info`: describe a folder, a document of it, or its truncated documents; no locks."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from m3cli.config import RunConfig
from m3cli.corpus.plan import Plan
from m3cli.corpus.sources import find_sources
from m3cli.errors import ForeignFolder, UsageError
from m3cli.jobs.encode.resolve import plan_run
from m3cli.jobs.reread import find_input, plan_one_shard, read_texts
from m3cli.records import Source
from m3cli.store.layout import TEXT_COLUMN
from m3cli.store.lookup import RowLookup
from m3cli.store.reader import FolderDescription, OutputFolder, describe, iter_ids, iter_parts, open_folder, read_shard

_log = logging.getLogger(__name__)

_NEAR_IDS = 3
_NEAR_LENGTH = 8
"most characters that a near id is longer or shorter"
_COLUMNS = ("chunk_index", "num_chunks", "char_start", "char_end", "num_tokens", "truncated")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    """A row of a document and its span in the document's text."""

    chunk_index: int
    num_chunks: int
    char_start: int
    "code points of title + title separator + text"
    char_end: int
    num_tokens: int
    truncated: bool
    text: str | None
    "None: not requested"


def describe_folder(folder: str) -> FolderDescription:
    """Describe a complete or incomplete folder."""
    return describe(open_folder(Path(folder)))


def find_chunks(folder: str, document_id: str, *, text: bool = False, source: str | None = None) -> list[ChunkSpan]:
    """Return the rows of a document in order; their text is read from the folder, or else from the input.

    If several documents have the id, the first is returned, with a warning.

    Args:
        folder: an output folder.
        document_id: the document's id.
        text: read the text too.
        source: path of the input now; None: unchanged.

    Raises:
        UsageError: the folder has no such document.
        CorpusError, ForeignFolder: the folder has no text, and the input is missing or has changed.
    """
    opened = open_folder(Path(folder))
    found = RowLookup(opened).find([document_id])
    if not len(found.row):
        near = _find_near(opened, document_id)
        hint = f"; near ids: {', '.join(map(repr, near))}" if near else ""
        raise UsageError(f"{folder} has no document with id {document_id!r}{hint}")
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
        document = _read_text(opened, shard, document_id, source=source)
        texts = [document[start:end] for start, end in zip(starts, ends, strict=True)]
    return [
        ChunkSpan(**dict(zip(_COLUMNS, values, strict=True)), text=row_text)
        for *values, row_text in zip(*columns, texts, strict=True)
    ]


def _find_near(folder: OutputFolder, document_id: str) -> list[str]:
    """Return up to three ids that resemble one: with its beginning, in other case, or with typing errors."""
    wanted = document_id.casefold()
    near: list[str] = []
    for ids, _ in iter_ids(folder.path, folder.entries):
        begun = [name for name in ids.to_pylist() if _begins_alike(name.casefold(), wanted)]
        near = difflib.get_close_matches(document_id, dict.fromkeys([*near, *begun]), n=_NEAR_IDS, cutoff=0.6)
    return near


def _begins_alike(name: str, wanted: str) -> bool:
    return abs(len(name) - len(wanted)) < _NEAR_LENGTH and (name[:2] == wanted[:2] or name[-2:] == wanted[-2:])


def _read_text(folder: OutputFolder, shard: int, document_id: str, *, source: str | None) -> str:
    entry = folder.entries[shard]
    run, plan = _find_source(folder.run, folder, shard, source)
    for text in read_texts(run, {shard}, plan=plan):
        if text.input_hash != entry.input_hash:
            raise ForeignFolder(f"{entry.source} has changed since {folder.path.name} was made from it: drop --text")
        for document in text.documents:
            if document.id == document_id:
                return document.text
    raise ForeignFolder(f"the input has no document {document_id!r} any more: drop --text")


def _find_source(run: RunConfig, folder: OutputFolder, shard: int, source: str | None) -> tuple[RunConfig, Plan]:
    """Return the run with the current paths of its input, and a plan that has the shard.

    Raises:
        ForeignFolder: --input is not the input of the folder.
    """
    if source is None:
        run = find_input(run, folder.path, otherwise="name it with --input")
        return run, plan_run(run)
    formats = {each.format for each in run.sources}
    found = find_sources((source,), input_format=formats.pop() if len(formats) == 1 else "auto", stdin=None)
    names = len(run.sources) > 1  # a single file may have been renamed
    if [_identify(each, name=names) for each in found] == [_identify(each, name=names) for each in run.sources]:
        run = replace(run, sources=found)
        return run, plan_run(run)
    entry = folder.entries[shard]
    wanted = run.sources[entry.shard.source]
    # One file of several is enough, unless it is compressed: its rows are counted from the start of the input.
    if len(found) == 1 and not wanted.sequential and _identify(found[0], name=False) == _identify(wanted, name=False):
        sources = [found[0] if each is wanted else each for each in run.sources]
        run = replace(run, sources=tuple(sources))
        return run, plan_one_shard(run, entry.shard)
    remedies = []
    if len(run.sources) == 1 or not wanted.sequential:
        remedies.append("name that file")
    if len(run.sources) > 1:
        remedies.append(f"name the folder with all {len(run.sources)} files of the input")
    raise ForeignFolder(
        f"--input {source} is not what {folder.path.name} was made from: the document is in {wanted.name}, "
        f"{wanted.size:,} bytes of {wanted.format}; {', '.join(remedies)}, or drop --text"
    )


def _identify(source: Source, *, name: bool) -> tuple[str, str, str, int]:
    return source.name if name else "", source.format, source.compression, source.size


def list_truncated(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield id, encoded tokens and encoded code points of each truncated document."""
    for part in iter_parts(
        open_folder(Path(folder)), outputs=(), columns=("id", "num_tokens", "char_end", "truncated")
    ):
        cut = part.rows.filter(part.rows.column("truncated"))
        names = ("id", "num_tokens", "char_end")
        yield from zip(*(cut.column(name).to_pylist() for name in names), strict=True)

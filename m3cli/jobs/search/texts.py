"""Texts of hits, read from the input that a folder without text was made from.

Only the shards of the hits are read, from plain or Parquet files that have the same content as then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m3cli.corpus.fields import kept_schema
from m3cli.corpus.plan import Plan
from m3cli.corpus.reader import read_shards
from m3cli.errors import CorpusError
from m3cli.store.reader import OutputFolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A hit whose text is read."""

    shard: int
    id: str
    "of its document"
    start: int
    stop: int
    "in code points of the document's text"


def read_passages(folder: OutputFolder, passages: Sequence[Passage], *, length: int) -> list[str | None]:
    """Return the first `length` code points of each passage; None: it is not in the input, or that is not read."""
    wanted: dict[int, set[str]] = {}
    for passage in passages:
        wanted.setdefault(passage.shard, set()).add(passage.id)
    texts: dict[tuple[int, str], str] = {}
    for source in sorted({folder.entries[shard].shard.source for shard in wanted}):
        shards = [shard for shard in sorted(wanted) if folder.entries[shard].shard.source == source]
        texts.update(_read_documents(folder, source, {shard: wanted[shard] for shard in shards}))
    found = [texts.get((passage.shard, passage.id)) for passage in passages]
    return [
        None if text is None else text[passage.start : passage.stop][:length]
        for text, passage in zip(found, passages, strict=True)
    ]


def _read_documents(
    folder: OutputFolder, number: int, wanted: dict[int, set[str]]
) -> Iterator[tuple[tuple[int, str], str]]:
    """Yield shard, id and text of some documents of a source; none if it is missing or has changed."""
    config, source = folder.run.config, folder.run.sources[number]
    try:
        status = Path(source.path).stat()
    except OSError:
        return
    if source.sequential or status.st_size != source.size:
        return
    shards = tuple(replace(folder.entries[index].shard, source=0) for index in wanted)
    try:
        for text in read_shards(
            (replace(source, mtime_ns=status.st_mtime_ns),),
            plan=Plan(
                shards=shards, num_sources=1, complete=True, shard_size=config.shard_size, limit=None, rows_left=None
            ),
            fields=config.fields,
            schema=kept_schema((source,), config.fields) if config.fields.kept else None,
            title_sep=config.title_sep,
            max_row_bytes=config.max_row_bytes,
            ask=lambda _: "read",
        ):
            index = text.shard.index
            if text.input_hash == folder.entries[index].input_hash:
                for document in reversed(text.documents):  # of equal ids the first
                    if document.id in wanted[index]:
                        yield (index, document.id), document.text
    except CorpusError:
        _log.warning("%s is not what %s was made from: hits are shown without text", source.name, folder.path.name)

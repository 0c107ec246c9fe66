"""Read the input of a folder again: some of its shards, or the texts of hits in a folder without text.

For hits only their shards are read, from files that have the same content as then; what comes before them in a CSV or
compressed file is read too, so that large ones are not read.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from m3cli.config import EncodeRequest, RunConfig
from m3cli.corpus.plan import Plan
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.remote import is_remote
from m3cli.corpus.streams import corpus_errors, read_size_and_mtime
from m3cli.errors import CorpusError
from m3cli.jobs.encode.resolve import make_form, plan_run, resume_run
from m3cli.records import Shard, ShardText
from m3cli.store.reader import OutputFolder


def find_input(run: RunConfig, root: Path, *, otherwise: str) -> RunConfig:
    """Return the run with its sources as they are today.

    Raises:
        CorpusError: a source is missing or standard input; `otherwise` is the remedy.
        ForeignFolder: the size of a source has changed.
    """
    if any(source.path == "-" for source in run.sources):
        raise CorpusError(f"{root.name} was made from standard input, which cannot be read again; {otherwise}")
    now = []
    for source in run.sources:
        if not is_remote(source.path) and not Path(source.path).exists():
            raise CorpusError(f"{source.path} is gone: put {source.name} back there, or {otherwise}")
        with corpus_errors(source):
            size, mtime_ns = read_size_and_mtime(source.path)
        now.append(replace(source, size=size, mtime_ns=mtime_ns))
    return resume_run(run, EncodeRequest(inputs=()), sources=tuple(now), out=root.name)


def plan_one_shard(run: RunConfig, shard: Shard) -> Plan:
    """Return a plan with one shard of a source that can be read from any row."""
    return Plan(
        shards=(shard,),
        num_sources=len(run.sources),
        complete=True,
        shard_size=run.config.shard_size,
        limit=None,
        rows_left=None,
    )


def read_texts(run: RunConfig, shards: Container[int], *, plan: Plan | None = None) -> Iterator[ShardText]:
    """Read the documents of some shards again; `plan` has them, None: the plan of the run."""

    def ask(shard: Shard) -> Action:
        return "read" if shard.index in shards else "skip"

    config = run.config
    texts = read_shards(
        run.sources,
        plan=plan or plan_run(run),
        fields=config.fields,
        schema=make_form(run).kept,
        title_sep=config.title_sep,
        max_row_bytes=config.max_row_bytes,
        ask=ask,
    )
    return (text for text in texts if text.shard.index in shards)


SEQUENTIAL_BYTES = 32 << 20
"of a file that is read from its start, CSV and compressed ones, for the texts of a shard"
KEPT_CHARS = 64 << 20
"of the texts that are in memory for further queries"

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


class InputTexts:
    """Texts of a folder's input, by shard; the last ones that were read are kept."""

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self._shards: dict[int, dict[str, str]] = {}

    def read(self, passages: Sequence[Passage], *, length: int) -> list[str | None]:
        """Return the first `length` code points of each passage; None: it is not in the input, or that is not read."""
        found: list[str | None] = []
        for passage in passages:
            texts = self._shards.pop(passage.shard, None)
            if texts is None:
                texts = _read_documents(self._folder, passage.shard)
            self._shards[passage.shard] = texts  # the last one
            text = texts.get(passage.id)
            found.append(None if text is None else text[passage.start : passage.stop][:length])
        while len(self._shards) > 1 and sum(self._count(shard) for shard in self._shards) > KEPT_CHARS:
            del self._shards[next(iter(self._shards))]
        return found

    def _count(self, shard: int) -> int:
        return sum(map(len, self._shards[shard].values()))


def _read_documents(folder: OutputFolder, index: int) -> dict[str, str]:
    """Return the texts of a shard by id; none if its source is missing, has changed, or takes long to read."""
    from m3cli.jobs.reread import plan_one_shard, read_texts  # noqa: PLC0415  only where texts are shown

    entry = folder.entries[index]
    source = folder.run.sources[entry.shard.source]
    if is_remote(source.path):
        return {}
    try:
        size, mtime_ns = read_size_and_mtime(source.path)
    except (OSError, CorpusError):
        return {}
    if size != source.size or (source.sequential and size > SEQUENTIAL_BYTES):
        return {}
    run = replace(folder.run, sources=(replace(source, mtime_ns=mtime_ns),))
    number = entry.shard.start // run.config.shard_size if source.sequential else index
    plan = None if source.sequential else plan_one_shard(run, replace(entry.shard, source=0))
    try:
        (text,) = read_texts(run, {number}, plan=plan)
    except CorpusError:
        _log.warning("%s is not what %s was made from: hits are shown without text", source.name, folder.path.name)
        return {}
    if text.input_hash != entry.input_hash:
        return {}
    return {document.id: document.text for document in reversed(text.documents)}  # of equal ids the first

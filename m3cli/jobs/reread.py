"""Read the input of a folder again, for some of its shards."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path

from m3cli.config import EncodeRequest, RunConfig
from m3cli.corpus.plan import Plan
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.remote import is_remote
from m3cli.corpus.streams import corpus_errors, read_size_and_mtime
from m3cli.errors import CorpusError
from m3cli.jobs.encode.resolve import make_form, plan_run, resume_run
from m3cli.records import Shard, ShardText


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

"""A run's folder, opened: its settings settled or adopted, its shards planned, what is done in it known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m3cli.config import EncodeRequest, RunConfig
from m3cli.corpus.fields import kept_schema
from m3cli.corpus.plan import Plan, plan_shards
from m3cli.corpus.reader import read_shards
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import CorpusError, ForeignFolder, OutputError, UsageError, refuse_unreachable
from m3cli.jobs.run import (
    adopt_run,
    find_changed,
    name_model,
    open_checkpoint,
    refuse_other_checkpoint,
    settle_run,
)
from m3cli.jobs.share import Share
from m3cli.jobs.since import settle_since
from m3cli.paths import check_local
from m3cli.records import DoneEntry, ShardCounts, ShardText, Source
from m3cli.store.folder import RunFolder
from m3cli.store.layout import RUN_NAME, RowForm

if TYPE_CHECKING:
    from m3cli.encoder.checkpoint import Checkpoint
    from m3cli.encoder.tokenizer import Tokenizer
    from m3cli.jobs.estimate import Estimate

_ENDINGS = {".gz", ".zst", ".jsonl", ".ndjson", ".json", ".tsv", ".txt", ".text", ".parquet", ".pq"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A run with what it needs beside its folder; of a new one, before there is a folder."""

    run: RunConfig
    form: RowForm
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    estimate: Estimate | None = None
    "of the whole corpus; None: not known, or not wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A folder opened for this run, and what is known of it."""

    folder: RunFolder
    name: str
    run: RunConfig
    form: RowForm
    plan: Plan
    done: dict[int, DoneEntry]
    share: Share
    resumed: bool
    checkpoint: Checkpoint | None
    "that was asked for, compared with the folder's; None: none was"

    @property
    def shown_path(self) -> str:
        """The folder's path as short as it can be said from here."""
        path, here = self.folder.path, Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    @property
    def counts(self) -> ShardCounts:
        """What the folder held when it was opened."""
        return sum((entry.counts for entry in self.done.values()), start=ShardCounts())

    @property
    def num_shards(self) -> int | None:
        """Shards of the whole folder; None where only reading tells."""
        if (manifest := self.folder.manifest()) is not None:
            return manifest.num_shards
        return len(self.plan.shards) if self.plan.complete else None

    def read(self, stdin: PeekableStream | None) -> Iterator[ShardText]:
        """Read the shards that are left to do, comparing finished ones whose input may have changed."""
        config = self.run.config
        texts = read_shards(
            self.run.sources,
            plan=self.plan,
            fields=config.fields,
            schema=self.form.kept,
            title_sep=config.title_sep,
            max_row_bytes=config.max_row_bytes,
            ask=self.share.ask,
            stdin=stdin,
        )
        return (text for text in texts if self.share.is_wanted(text))


def choose_out(request: EncodeRequest, sources: tuple[Source, ...]) -> Path:
    """Return the output folder: `--out`, or the one input's name with .m3 in the current folder.

    Raises:
        UsageError: neither is known, or it is not on this machine.
        OutputError: the system refuses to look at it.
    """
    out = _name_out(request, sources)
    refuse_unreachable(out / RUN_NAME, OutputError)
    return out


def _name_out(request: EncodeRequest, sources: tuple[Source, ...]) -> Path:
    if request.out:
        check_local(request.out, "--out")
        return Path(request.out)
    if len(request.inputs) != 1 or request.inputs[0] == "-":
        what = "standard input" if "-" in request.inputs else f"{len(request.inputs)} inputs"
        raise UsageError(f"{what}: say where to write with --out DIR")
    given = Path(request.inputs[0])
    refuse_unreachable(given, CorpusError)
    if given.is_dir():
        return Path(f"{given.resolve().name}.m3")
    if len(sources) != 1:
        raise UsageError(f"{request.inputs[0]!r} names {len(sources)} files: say where to write with --out DIR")
    name = Path(sources[0].path).name
    while (stem := Path(name)).suffix in _ENDINGS and stem.stem:
        name = stem.stem
    return Path(f"{name}.m3")


def settle(request: EncodeRequest, sources: tuple[Source, ...], stdin: PeekableStream | None) -> Settled:
    """Settle a new folder's run, with all that can be wrong with corpus and model."""
    # A second, only for a new folder.
    from m3cli.encoder.chunker import cutting_of, refuse_no_room  # noqa: PLC0415
    from m3cli.encoder.tokenizer import load_tokenizer  # noqa: PLC0415

    checkpoint = open_checkpoint(request)
    tokenizer = load_tokenizer(checkpoint)
    run = settle_run(
        request, sources=sources, checkpoint=checkpoint, tokenizer_hash=tokenizer.serialisation_hash, stdin=stdin
    )
    refuse_no_room(tokenizer, cutting_of(run.config))
    form = make_form(run)
    if request.since_run is not None:
        run = settle_since(run, request.since_run)
    return Settled(run=run, form=form, checkpoint=checkpoint, tokenizer=tokenizer)


def make_form(run: RunConfig, *, kept: bool = True) -> RowForm:
    """Say what every shard of a run's folder has in common; the types of kept fields only the input knows."""
    config = run.config
    return RowForm(
        format=config.format,
        outputs=config.outputs,
        dim=run.checkpoint.dim,
        vocabulary=run.checkpoint.vocabulary,
        dense_dtype=config.dense_dtype,
        colbert=config.colbert_form,
        compression=config.compression,
        exact_vectors=config.exact_vectors,
        keep_text=config.keep_text,
        kept=kept_schema(run.sources, config.fields) if kept and config.fields.kept else None,
    )


def open_run(folder: RunFolder, fresh: RunConfig | None, request: EncodeRequest, sources: tuple[Source, ...]) -> Opened:
    """Write the folder's run.json, or adopt it; of workers that start together one writes."""
    name = folder.path.name
    with folder.lock.initialising():
        before = folder.run()
        if before is None:
            if fresh is None:
                raise ForeignFolder(f"{folder.path} lost its run.json while this run started; run the command again")
            folder.write_run(fresh)
    checkpoint = None
    if before is None:
        assert fresh is not None
        run, changed = fresh, frozenset[int]()
    else:
        run = adopt_run(before, request, sources=sources, out=name)
        changed = find_changed(before.sources, sources)
        if request.verify_input:
            changed = frozenset(range(len(sources)))
        if name_model(request) is not None:
            checkpoint = open_checkpoint(request)
            refuse_other_checkpoint(run, checkpoint, out=name)
    done = folder.done()
    folder.check_lengths(done.values())
    return Opened(
        folder=folder,
        name=name,
        run=run,
        form=make_form(run),
        plan=plan_run(run),
        done=done,
        share=Share(done, worker=request.worker, num_workers=request.num_workers, changed=changed, out=name),
        resumed=before is not None,
        checkpoint=checkpoint,
    )


def plan_run(run: RunConfig) -> Plan:
    """Plan the shards of a run, as far as they are known before anything is read."""
    config = run.config
    return plan_shards(
        run.sources,
        fields=config.fields,
        shard_size=config.shard_size,
        limit=config.limit,
        max_row_bytes=config.max_row_bytes,
    )

"""`m3 encode`: resolve the config (resolve.py), open the folder, run the pipeline (pipeline.py), report.

A shard is done when its entry is on disk. Whatever stops the program costs the shards in flight and no other.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from m3cli.config import EncodeRequest, RunConfig
from m3cli.corpus.sources import count_unread, find_sources
from m3cli.corpus.streams import PeekableStream, check_unchanged
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, Interrupted, UsageError, count_noun
from m3cli.jobs.encode.estimate import check_disk_space
from m3cli.jobs.encode.increment import PreviousFolder, open_previous
from m3cli.jobs.encode.lifecycle import FirstRows, MetricsFile, Stop, check_max_skipped, keep_metrics
from m3cli.jobs.encode.resolve import (
    NewRun,
    OpenRun,
    check_same_checkpoint,
    check_same_tokenizer,
    describe_rest,
    open_checkpoint_of,
    open_run,
    resolve_new_run,
)
from m3cli.jobs.paths import check_paths, choose_out, list_own
from m3cli.progress import Progress, Stopwatch
from m3cli.records import DoneEntry, RunSummary, ShardCounts
from m3cli.store.commit import check_writable
from m3cli.store.folder import damage_stops, open_run_folder, read_run_to_resume
from m3cli.store.reader import read_id_hashes
from m3cli.store.verify.rows import find_duplicate_ids

if TYPE_CHECKING:
    from m3cli.jobs.encode.pipeline import TokenisedShard


GC_THRESHOLD = 200_000
"""Allocations between two runs of the garbage collector. Documents hold no cycles; with Python's own threshold (700 to
2,000) the reader took 4.4 us a row instead of 3.0 (shards of 32 MiB)."""


@dataclass(slots=True)
class Tally:
    """Totals of this run, counted as shards are committed."""

    counts: ShardCounts = field(default_factory=ShardCounts)
    reasons: Counter[str] = field(default_factory=Counter)
    num_shards: int = 0
    num_reused: int = 0
    "documents whose vectors were reused from a previous folder"
    num_files: int = 0
    num_bytes: int = 0

    def add(self, entry: DoneEntry, shard: TokenisedShard) -> None:
        """Count a committed shard."""
        self.counts += entry.counts
        self.reasons.update(skipped.reason for skipped in shard.text.skipped)
        self.num_shards += 1
        self.num_reused += shard.num_reused
        if shard.linked is None:
            self.num_files += len(entry.files)
            self.num_bytes += sum(file.length for file in entry.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What reports and ends a run."""

    progress: Progress
    watch: Stopwatch
    stop: Stop
    metrics: MetricsFile
    tally: Tally


def encode_corpus(
    request: EncodeRequest,
    *,
    progress: Progress,
    stdin: PeekableStream | None = None,
    stop: Stop | None = None,
    wants: Callable[[int], bool] | None = None,
    encode_with: Callable[..., None] | None = None,
) -> int:
    """Encode a corpus, or resume the folder of an earlier run.

    Args:
        request: the options.
        progress: shows the run.
        stdin: standard input, if it is an input.
        stop: ends the run early.
        wants: decides which shards this process encodes, see ShardSelector; None: those of its stripe.
        encode_with: encodes instead of `encode`, with the same arguments.

    Returns:
        the exit code: 0, or 3 if the folder is complete and rows were skipped.
    """
    watch = Stopwatch()
    files = {"--metrics": request.metrics, "--log-file": request.log_file, "--gone": request.gone}
    read: dict[str, Sequence[str | None]] = {"INPUT": request.inputs, "--since-run": [request.since_run]}
    check_paths({"--out": request.out, **files}, read, model=request.model)
    with keep_metrics(request.metrics, out=request.out or "") as metrics:
        progress.open_log(request.log_file)
        check_writable(request.gone)
        own = list_own(request.inputs, list(files.values()))
        sources = find_sources(request.inputs, input_format=request.source_format, stdin=stdin, own=own)
        out = choose_out(request, sources)
        metrics.out = str(out)
        with watch.count("loading"):
            # Errors of corpus, model and disk space are raised before a folder is made.
            before = read_run_to_resume(out)
            check_gone(request, before)
            fresh = None if before else resolve_new_run(request, sources, stdin)
            if fresh is not None:
                fresh = estimate_run(fresh, request, progress)
                if request.space_check and (estimate := fresh.estimate):
                    choices = estimate.colbert_choices
                    check_disk_space(out, estimate.bytes_on_disk, num_shards=None, done={}, choices=choices)
        with open_run_folder(out, worker=request.worker, num_workers=request.num_workers) as folder:
            metrics.write()
            opened = open_run(folder, None if fresh is None else fresh.run, request, sources, wants)
            tally = Tally()
            if (todo := opened.num_shards) is not None:
                todo = opened.selector.count_todo(todo)
            if todo == 0:
                report_complete(opened, request, progress=progress, stdin=stdin)
            else:
                work = Work(progress=progress, watch=watch, stop=stop or Stop(), metrics=metrics, tally=tally)
                with report_kept_shards(opened):
                    (encode_with or encode)(opened, request, fresh=fresh, todo=todo, stdin=stdin, work=work)
            code = exit_code_of(opened, request, tally)
        metrics.numbers["exit_code"] = code
    return code


def check_gone(request: EncodeRequest, before: RunConfig | None) -> None:
    """Raise UsageError if --gone is typed and there is no previous folder whose ids it could list."""
    if request.gone and not request.since_run and (before is None or before.since_path is None):
        raise UsageError(f"--gone {request.gone} needs --since-run: it lists the ids of that folder; give both or none")


def estimate_run(new: NewRun, request: EncodeRequest, progress: Progress) -> NewRun:
    """Estimate the size of a run's folder, unless neither the space check nor the panel needs it."""
    from m3cli.jobs.encode.estimate import estimate_corpus  # noqa: PLC0415  torch, only where there is work

    if not request.space_check and progress.mode == "none":
        return new
    return replace(new, estimate=estimate_corpus(new.run, new.form, new.tokenizer))


def prepare_resumed_run(opened: OpenRun, request: EncodeRequest, progress: Progress) -> NewRun:
    """Return what encoding needs for a folder that is resumed.

    Raises:
        ForeignFolder: checkpoint or tokenizer differ from the folder's.
        OutputError: the disk is too small for the remaining shards.
    """
    from m3cli.encoder.tokenizer import load_tokenizer  # noqa: PLC0415  torch, only where there is work

    run = opened.run
    checkpoint = opened.checkpoint
    if checkpoint is None:
        checkpoint = open_checkpoint_of(request, run)
        check_same_checkpoint(run, checkpoint, out=opened.name)
    tokenizer = load_tokenizer(checkpoint)
    check_same_tokenizer(run, tokenizer.serialisation_hash, out=opened.name)
    ready = NewRun(run=run, form=opened.form, checkpoint=checkpoint, tokenizer=tokenizer)
    ready = estimate_run(ready, request, progress)
    if request.space_check and (estimate := ready.estimate):
        sizes = estimate.bytes_on_disk
        check_disk_space(opened.folder.path, sizes, num_shards=opened.num_shards, done=opened.done)
    return ready


def report_complete(
    opened: OpenRun, request: EncodeRequest, *, progress: Progress, stdin: PeekableStream | None
) -> None:
    """Compare input that may have changed, then report that nothing is to do; no model is loaded."""
    for _ in opened.read(stdin):
        pass
    if opened.folder.manifest() is None:
        opened.folder.write_manifest(len(opened.plan.shards))
    if request.since_run or request.gone:
        previous = open_previous(opened.run, request.since_run, out=opened.name)
        if previous is not None and opened.folder.manifest() is not None:
            with damage_stops(opened.folder.path):
                hashes = read_id_hashes(opened.folder.path, opened.done)
            previous.write_removed_ids(hashes, listing=request.gone)
    counts = opened.counts
    progress.say(
        f"nothing to do: {opened.name} holds {', '.join(opened.run.config.outputs)} of "
        f"{count_noun(counts.documents, 'document')} ({count_noun(counts.chunks, 'row')}, {counts.skipped:,} skipped) "
        f"in {count_noun(len(opened.done), 'shard')}"
    )
    rows = counts.documents + counts.skipped
    if (rest := describe_rest(opened.run, request, out=opened.shown_path, rows=rows)) is not None:
        progress.say(rest)


@contextmanager
def report_kept_shards(opened: OpenRun) -> Iterator[None]:
    """Report how many shards are kept if Ctrl-C ends the run.

    Raises:
        Interrupted: Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        kept, planned = len(opened.folder.list_done()), opened.num_shards
        shards = count_noun(kept, "shard is", "shards are")
        if planned is not None:
            shards = f"{kept:,} of {count_noun(planned, 'shard is', 'shards are')}"
        raise Interrupted(f"interrupted: {shards} kept; run the same command again to resume") from error


def prepare_run(
    opened: OpenRun, request: EncodeRequest, *, fresh: NewRun | None, device: str, work: Work
) -> tuple[NewRun, PreviousFolder | None, dict[str, int]]:
    """Show the plan of a run; return what encoding needs, the previous folder and the files that are not read."""
    from m3cli.jobs.plan import describe_run  # noqa: PLC0415  torch, only where there is work

    run, progress = opened.run, work.progress
    with work.watch.count("loading"):
        # Of workers that begin a folder together one writes run.json, the others resume.
        ready = fresh if fresh and not opened.resumed else prepare_resumed_run(opened, request, progress)
        previous = open_previous(run, request.since_run, out=opened.name)
    unread = count_unread(request.inputs, request.source_format)
    progress.show_plan(
        describe_run(
            run,
            out=opened.shown_path,
            device=device,
            estimate=ready.estimate,
            num_shards=opened.num_shards,
            done=opened.done,
            resumed=opened.resumed,
            unread=unread,
        )
    )
    if opened.resumed and (rest := describe_rest(run, request, out=opened.shown_path)) is not None:
        progress.say(rest)
    return ready, previous, unread


def encode(
    opened: OpenRun,
    request: EncodeRequest,
    *,
    fresh: NewRun | None,
    todo: int | None,
    stdin: PeekableStream | None,
    work: Work,
) -> None:
    """Encode the remaining shards and report; `fresh` is None unless this run has begun the folder."""
    # torch, and what imports it: only where there is work
    from m3cli.encoder import device as machine  # noqa: PLC0415
    from m3cli.jobs.encode.pipeline import Pipeline, load_encoder, run_pipeline  # noqa: PLC0415

    run, progress, watch = opened.run, work.progress, work.watch
    device = machine.resolve_device(request.device)
    ready, previous, unread = prepare_run(opened, request, fresh=fresh, device=device, work=work)
    checkpoint, tokenizer = ready.checkpoint, ready.tokenizer
    if device == "cpu" and (own := machine.auto_threads()) < run.runtime.threads:
        threads = count_noun(run.runtime.threads, "thread")
        progress.say(f"{opened.name} was begun with {threads}, which decide its bytes; this machine has {own}: slower")
    progress.note(f"loading {run.checkpoint.name}")
    with watch.count("loading"):
        encoder = load_encoder(run, checkpoint, tokenizer, device=device)
    work.stop.check()
    progress.start(shards_todo=todo)
    before, began = opened.counts, time.perf_counter()
    pipeline = Pipeline(
        run=run,
        form=opened.form,
        folder=opened.folder,
        tokenizer=tokenizer,
        encoder=encoder,
        previous=previous,
        first_rows=FirstRows(opened.counts, worker=request.worker, num_workers=request.num_workers),
        watch=watch,
        progress=progress,
        poll=partial(poll_stop_and_metrics, opened, work),
    )
    try:
        with reduced_gc(), closing(run_pipeline(opened.read(stdin), pipeline)) as committed:
            for shard, entry in committed:
                work.tally.add(entry, shard)
                counts = before + work.tally.counts
                check_max_skipped(
                    counts, request.max_skipped, work.tally.reasons, out=opened.shown_path, complete=False
                )
                if work.tally.num_shards != todo:
                    work.stop.check()
    finally:
        machine.set_threads(run.runtime.threads)  # for the caller, who may go on in this process
        progress.stop()
    encoded = time.perf_counter() - began
    for source in run.sources:
        check_unchanged(source)
    complete = opened.folder.write_manifest(opened.selector.num_shards)
    device_bytes = machine.peak_device_bytes(device)
    summary = summarise(opened, work, seconds=encoded, device_bytes=device_bytes, unread=unread)
    summary = replace(summary, repeated=dict(encoder.repeated))
    if complete:
        summary = add_id_counts(summary, opened, request, previous)
    names = {"device": device, "device_name": machine.name_device(device), "torch": machine.TORCH_VERSION}
    opened.folder.write_metrics({**metrics_document(summary), **names})
    if complete:
        opened.folder.add_up_metrics()
    progress.show_summary(summary)


def poll_stop_and_metrics(opened: OpenRun, work: Work) -> None:
    """End the run if it is to end at once; write the metrics file if it is due."""
    work.stop.check(in_shard=True)
    if work.metrics.due:
        count_metrics(opened, work)
        work.metrics.write()


def count_metrics(opened: OpenRun, work: Work) -> None:
    """Update the numbers of the metrics file."""
    counts, numbers = work.tally.counts, work.metrics.numbers
    numbers.update(
        documents=counts.documents,
        chunks=counts.chunks,
        tokens=counts.tokens,
        skipped=counts.skipped,
        bytes_written=work.tally.num_bytes,
        shards_done=len(opened.done) + work.tally.num_shards,
        tokens_per_second=counts.tokens / max(work.watch.total() - work.watch.seconds["loading"], 1e-9),
        peak_memory_bytes=peak_memory(),
    )
    if opened.num_shards is not None:
        numbers["shards"] = opened.num_shards


@contextmanager
def reduced_gc() -> Iterator[None]:
    """Run the garbage collector seldom, and never over the objects that exist now."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def add_id_counts(
    summary: RunSummary, opened: OpenRun, request: EncodeRequest, previous: PreviousFolder | None
) -> RunSummary:
    """Add the number of duplicate ids of a complete folder, and of ids of a previous folder that it lacks."""
    root, shards = opened.folder.path, sorted(opened.folder.list_done())
    with damage_stops(root):
        hashes = read_id_hashes(root, shards)
        duplicates = find_duplicate_ids(root, hashes).count
    gone = None if previous is None else previous.write_removed_ids(hashes, listing=request.gone)
    return replace(summary, duplicate_ids=duplicates, gone=gone)


def summarise(opened: OpenRun, work: Work, *, seconds: float, device_bytes: int, unread: dict[str, int]) -> RunSummary:
    """Return the summary of this run."""
    tally, watch, counts = work.tally, work.watch, work.tally.counts
    count_metrics(opened, work)
    return RunSummary(
        out=opened.shown_path,
        documents=counts.documents,
        in_folder=(opened.counts + counts).documents,
        chunks=counts.chunks,
        tokens=counts.tokens,
        skipped=counts.skipped,
        truncated=counts.truncated,
        missing_ids=counts.missing_ids,
        num_files=tally.num_files,
        bytes_written=tally.num_bytes,
        seconds={
            **{stage: round(spent, 3) for stage, spent in watch.seconds.items()},
            "total": round(watch.total(), 3),
        },
        tokens_per_second=round(counts.tokens / seconds, 1) if seconds else 0.0,
        peak_memory_bytes=peak_memory(),
        peak_device_bytes=device_bytes,
        shards_done=len(opened.folder.list_done()),
        num_shards=opened.selector.num_shards,
        skipped_reasons=dict(tally.reasons.most_common()),
        taken=tally.num_reused,
        gone=None,
        duplicate_ids=None,
        repeated={},
        unread=unread,
    )


def peak_memory() -> int:
    """Return the peak memory of this process in bytes (ru_maxrss: KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def metrics_document(summary: RunSummary) -> dict[str, object]:
    """Return the content of metrics.json."""
    left_out = {"out", "in_folder", "skipped_reasons", "duplicate_ids", "taken", "gone"}
    left_out |= {"shards_done", "num_shards", "unread"}
    return {name: getattr(summary, name) for name in RunSummary.__slots__ if name not in left_out}


def exit_code_of(opened: OpenRun, request: EncodeRequest, tally: Tally) -> int:
    """Return the exit code that describes the folder: 3 if it is complete and has skipped rows."""
    manifest = opened.folder.manifest()
    if manifest is None:
        return EXIT_DONE
    counts = manifest.counts
    out = opened.shown_path
    check_max_skipped(counts, request.max_skipped, tally.reasons, out=out, complete=True)
    return EXIT_ROWS_SKIPPED if counts.skipped else EXIT_DONE

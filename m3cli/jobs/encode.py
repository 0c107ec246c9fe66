"""`m3 encode`: a corpus through the model into a folder.

    plan -> reader -> tokenizer -> chunker        a thread that reads one shard ahead
    batcher -> model -> heads                     a thread that drives the device, a few batches ahead
    window -> writer -> commit                    this thread

A shard is done when its entry is on disk; whatever stops the program costs the shards in flight and no other.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

from m3cli.ahead import run_ahead
from m3cli.config import EncodeRequest
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED
from m3cli.jobs.opening import Opened, choose_out, open_run, settle
from m3cli.jobs.run import open_checkpoint, refuse_other_checkpoint, refuse_other_tokenizer
from m3cli.progress import Progress, Stopwatch
from m3cli.records import DoneEntry, RunSummary, ShardCounts, ShardText
from m3cli.store.entries import read_run
from m3cli.store.folder import RunFolder, open_run_folder

BATCHES_AHEAD = 4
"finished batches that may wait for the writer"


@dataclass(slots=True)
class Tally:
    """What this run did, counted as shards are committed."""

    counts: ShardCounts = field(default_factory=ShardCounts)
    reasons: Counter[str] = field(default_factory=Counter)
    num_files: int = 0
    num_bytes: int = 0

    def add(self, entry: DoneEntry, text: ShardText) -> None:
        """Count a committed shard."""
        self.counts += entry.counts
        self.reasons.update(skipped.reason for skipped in text.skipped)
        self.num_files += len(entry.files)
        self.num_bytes += sum(file.length for file in entry.files)


def encode_corpus(request: EncodeRequest, *, progress: Progress, stdin: PeekableStream | None = None) -> int:
    """Encode a corpus, or go on where an earlier run stopped.

    Returns:
        the exit code: 0, or 3 if the folder is complete and rows were skipped.
    """
    watch = Stopwatch()
    sources = find_sources(request.inputs, input_format=request.input_format, stdin=stdin)
    out = choose_out(request, sources)
    with watch.count("loading"):
        # What can be wrong with corpus or model is said before a folder is made for it.
        fresh = None if read_run(out) else settle(request, sources, stdin)
    with open_run_folder(out, worker=request.worker, num_workers=request.num_workers) as folder:
        opened = open_run(folder, fresh, request, sources)
        if (todo := opened.num_shards) is not None:
            todo = opened.share.count_todo(todo)
        if todo == 0:
            finish(opened, progress=progress, stdin=stdin)
        else:
            encode(opened, request, todo=todo, progress=progress, stdin=stdin, watch=watch)
        return judge(folder)


def finish(opened: Opened, *, progress: Progress, stdin: PeekableStream | None) -> None:
    """Say that nothing is to do, after comparing input that may have changed; no model is loaded."""
    for _ in opened.read(stdin):
        pass
    if opened.folder.manifest() is None:
        opened.folder.write_manifest(len(opened.plan.shards))
    counts = sum((entry.counts for entry in opened.done.values()), start=ShardCounts())
    progress.say(
        f"nothing to do: {opened.name} holds {', '.join(opened.run.meaning.outputs)} of {counts.documents:,} documents "
        f"({counts.chunks:,} rows, {counts.skipped:,} skipped) in {len(opened.done):,} shards"
    )


def encode(
    opened: Opened,
    request: EncodeRequest,
    *,
    todo: int | None,
    progress: Progress,
    stdin: PeekableStream | None,
    watch: Stopwatch,
) -> None:
    """Encode what is left, and say what was done."""
    # torch, and what speaks it, only where there is work
    from m3cli.encoder import device as machine  # noqa: PLC0415
    from m3cli.encoder.model import load_model  # noqa: PLC0415
    from m3cli.encoder.tokenizer import load_tokenizer  # noqa: PLC0415
    from m3cli.jobs import stages  # noqa: PLC0415
    from m3cli.jobs.estimate import estimate_corpus  # noqa: PLC0415
    from m3cli.jobs.plan import describe_run  # noqa: PLC0415

    run, meaning, tally = opened.run, opened.run.meaning, Tally()
    with watch.count("loading"):
        checkpoint = open_checkpoint(request)
        refuse_other_checkpoint(run, checkpoint, out=opened.name)
        tokenizer = load_tokenizer(checkpoint)
        refuse_other_tokenizer(run, tokenizer.serialisation_hash, out=opened.name)
        device = machine.resolve_device(request.device)
        estimate = estimate_corpus(run, opened.form, tokenizer)
    progress.show_plan(
        describe_run(
            run,
            out=str(opened.folder.path),
            device=device,
            estimate=estimate,
            num_shards=opened.num_shards,
            shards_done=len(opened.done),
            resumed=opened.resumed,
        )
    )
    with watch.count("loading"):
        machine.set_threads(run.threads)
        model = load_model(checkpoint, device=device, dtype=meaning.dtype)
    progress.start(shards_todo=todo)
    began = time.perf_counter()
    shards = run_ahead(
        stages.count_seconds(stages.tokenise_shards(opened.read(stdin), tokenizer, meaning=meaning), watch, "reading"),
        depth=1,
        name="reading",
    )
    batches = run_ahead(
        stages.encode_batches(
            shards,
            model,
            meaning=meaning,
            max_batch_tokens=run.max_batch_tokens,
            special_ids=tokenizer.special_ids,
            watch=watch,
            progress=progress,
        ),
        depth=BATCHES_AHEAD,
        name="encoding",
    )
    try:
        for shard, parts in groupby(batches, key=lambda batch: batch.shard):
            source = run.sources[shard.text.shard.source].name
            entry = stages.write_shard(opened.folder, shard, parts, form=opened.form, source=source, watch=watch)
            tally.add(entry, shard.text)
    finally:
        batches.close()
        progress.stop()
    encoded = time.perf_counter() - began
    opened.folder.write_manifest(opened.share.num_shards)
    summary = summarise(opened, tally, watch=watch, seconds=encoded, device_bytes=machine.peak_device_bytes(device))
    opened.folder.write_metrics(metrics_document(summary))
    progress.show_summary(summary)


def summarise(opened: Opened, tally: Tally, *, watch: Stopwatch, seconds: float, device_bytes: int) -> RunSummary:
    """Sum up what this run did."""
    counts = tally.counts
    return RunSummary(
        out=str(opened.folder.path),
        documents=counts.documents,
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
        shards_done=len(opened.folder.done()),
        num_shards=opened.share.num_shards,
        skipped_reasons=dict(tally.reasons.most_common()),
    )


def peak_memory() -> int:
    """Return the most memory this process held at once, in bytes (ru_maxrss: KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def metrics_document(summary: RunSummary) -> dict[str, object]:
    """Build the content of metrics.json."""
    left_out = {"out", "skipped_reasons", "shards_done", "num_shards"}
    return {name: getattr(summary, name) for name in RunSummary.__slots__ if name not in left_out}


def judge(folder: RunFolder) -> int:
    """Return the exit code that describes the folder: 3 if it is complete and rows were skipped."""
    manifest = folder.manifest()
    return EXIT_ROWS_SKIPPED if manifest is not None and manifest["counts"]["skipped"] else EXIT_DONE

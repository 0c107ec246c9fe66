"""`m3 plan`: what an encode would do; no writes, no locks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from m3cli.config import EncodeRequest, RunConfig, list_non_defaults
from m3cli.corpus.sources import count_unread, find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder import device as machine
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.jobs.encode.estimate import Estimate, count_needed, estimate_corpus, find_free_bytes
from m3cli.jobs.encode.pipeline import load_encoder, pack_batches
from m3cli.jobs.encode.resolve import (
    check_same_checkpoint,
    make_form,
    open_checkpoint_of,
    plan_run,
    resolve_new_run,
    resume_run,
)
from m3cli.jobs.paths import choose_out
from m3cli.records import Chunks, DoneEntry, RunPlan
from m3cli.store.folder import read_done_to_resume, read_run_to_resume

FIRST_TOKENS = 256
"of the sample, encoded first; then as many as take twice as long as needed at that rate, until a time is long enough"
MOST_TOKENS = 4 << 20
"in all, of the sample again and again"
LEAST_SECONDS = 1.0
"for which rows are encoded to know the rate"


def plan_corpus(request: EncodeRequest, *, stdin: PeekableStream | None = None) -> RunPlan:
    """Return what an encode with these options would do, and what is done already."""
    sources = find_sources(request.inputs, input_format=request.source_format, stdin=stdin)
    out = choose_out(request, sources)
    before = read_run_to_resume(out)
    done: Mapping[int, DoneEntry] = {}
    if before is None:
        resolved = resolve_new_run(request, sources, stdin)
        run, form, checkpoint, tokenizer = resolved.run, resolved.form, resolved.checkpoint, resolved.tokenizer
    else:
        run = resume_run(before, request, sources=sources, out=out.name)
        checkpoint = open_checkpoint_of(request, run)
        check_same_checkpoint(run, checkpoint, out=out.name)
        done, form, tokenizer = read_done_to_resume(out), make_form(run), load_tokenizer(checkpoint)
    plan, device = plan_run(run), machine.resolve_device(request.device)
    estimate = estimate_corpus(run, form, tokenizer)
    num_shards = len(plan.shards) if plan.complete else None
    described = describe_run(
        run,
        out=str(out),
        device=device,
        estimate=estimate,
        num_shards=num_shards,
        done=done,
        resumed=before is not None,
        unread=count_unread(request.inputs, request.source_format),
    )
    if estimate is None or len(done) == num_shards:
        return described
    rate, loading = measure_rate(run, checkpoint, tokenizer, estimate.sample, device=device)
    share = 1 - len(done) / num_shards if num_shards else 1.0
    return replace(described, tokens_per_second=rate, seconds=loading + share * estimate.tokens / rate)


def measure_rate(
    run: RunConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, sample: Chunks, *, device: str
) -> tuple[float, float]:
    """Encode rows of the corpus; return tokens per second, and the seconds of loading the model."""
    runtime, began = run.runtime, time.perf_counter()
    encoder = load_encoder(run, checkpoint, tokenizer, device=device)
    loading = time.perf_counter() - began
    # In the same random order for each plan: neighbours are alike.
    order = np.tile(np.random.default_rng(0).permutation(sample.num_rows), -(-MOST_TOKENS // len(sample.input_ids)))
    ends = np.cumsum(sample.num_tokens[order])
    start, tokens, seconds = 0, FIRST_TOKENS, 0.0
    while seconds < LEAST_SECONDS and start < len(order):
        stop = int(np.searchsorted(ends, tokens + (ends[start - 1] if start else 0))) + 1
        began = time.perf_counter()
        batches = pack_batches(sample, order[start:stop], encoder, max_batch_tokens=runtime.max_batch_tokens)
        for _ in encoder.encode_all(batches):
            pass
        seconds = time.perf_counter() - began
        rate = float(sample.num_tokens[order[start:stop]].sum()) / seconds
        start, tokens = stop, max(2 * tokens, int(2 * LEAST_SECONDS * rate))
    machine.set_threads(runtime.threads)
    return rate, loading


def describe_run(
    run: RunConfig,
    *,
    out: str,
    device: str,
    estimate: Estimate | None,
    num_shards: int | None,
    done: Mapping[int, DoneEntry],
    resumed: bool,
    unread: dict[str, int],
) -> RunPlan:
    """Return the content of the panel before a run."""
    config = run.config
    sizes = [source.size for source in run.sources]
    on_disk = estimate.bytes_on_disk if estimate else None
    return RunPlan(
        out=out,
        model=run.checkpoint.name,
        dtype=config.dtype,
        device=device,
        max_length=config.max_length,
        outputs=config.outputs,
        format=config.format,
        settings=list_non_defaults(config.to_json()),
        fingerprint=run.fingerprint,
        threads=run.runtime.threads,
        fields={name: getattr(config.fields, name) for name in ("id", "title", "text")},
        documents=estimate.documents if estimate else None,
        tokens=estimate.tokens if estimate else None,
        input_bytes=sum(sizes) if min(sizes) >= 0 else None,
        num_shards=num_shards,
        shards_done=len(done),
        bytes_on_disk=on_disk,
        bytes_needed=None if on_disk is None else count_needed(on_disk, num_shards=num_shards, done=done),
        free_bytes=find_free_bytes(Path(out)),
        colbert_choices=estimate.colbert_choices if estimate else None,
        tokens_per_second=None,
        seconds=None,
        resumed=resumed,
        unread=unread,
    )

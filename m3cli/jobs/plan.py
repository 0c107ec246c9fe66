"""`m3 plan`: what an encode would do; no writes, no locks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from m3cli.config import EncodeRequest, RunConfig, list_non_defaults
from m3cli.corpus.sources import count_unread, find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder import device as machine
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.jobs.encode.estimate import Estimate, count_needed, estimate_corpus, find_free_bytes
from m3cli.jobs.encode.resolve import (
    check_same_checkpoint,
    make_form,
    open_checkpoint,
    plan_run,
    resolve_new_run,
    resume_run,
)
from m3cli.jobs.paths import choose_out
from m3cli.records import DoneEntry, RunPlan
from m3cli.store.folder import read_done_to_resume, read_run_to_resume


def plan_corpus(request: EncodeRequest, *, stdin: PeekableStream | None = None) -> RunPlan:
    """Return what an encode with these options would do, and what is done already."""
    sources = find_sources(request.inputs, input_format=request.input_format, stdin=stdin)
    out = choose_out(request, sources)
    before = read_run_to_resume(out)
    done: Mapping[int, DoneEntry] = {}
    if before is None:
        resolved = resolve_new_run(request, sources, stdin)
        run, form, tokenizer = resolved.run, resolved.form, resolved.tokenizer
    else:
        run = resume_run(before, request, sources=sources, out=out.name)
        checkpoint = open_checkpoint(request.model, request.revision)
        check_same_checkpoint(run, checkpoint, out=out.name)
        done, form, tokenizer = read_done_to_resume(out), make_form(run), load_tokenizer(checkpoint)
    plan = plan_run(run)
    return describe_run(
        run,
        out=str(out),
        device=machine.resolve_device(request.device),
        estimate=estimate_corpus(run, form, tokenizer),
        num_shards=len(plan.shards) if plan.complete else None,
        done=done,
        resumed=before is not None,
        unread=count_unread(request.inputs),
    )


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
        documents=estimate.documents if estimate else None,
        tokens=estimate.tokens if estimate else None,
        input_bytes=sum(sizes) if min(sizes) >= 0 else None,
        num_shards=num_shards,
        shards_done=len(done),
        bytes_on_disk=on_disk,
        bytes_needed=None if on_disk is None else count_needed(on_disk, num_shards=num_shards, done=done),
        free_bytes=find_free_bytes(Path(out)),
        colbert_choices=estimate.colbert_choices if estimate else None,
        resumed=resumed,
        unread=unread,
    )

"""`m3 plan`: what an encode would do. Nothing is written, nothing is locked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3cli.config import EncodeRequest
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder import device as machine
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.jobs.estimate import Estimate, estimate_choices, estimate_corpus
from m3cli.jobs.opening import choose_out, make_form, plan_run, settle
from m3cli.jobs.run import Run, adopt_run, open_checkpoint, parse_run, refuse_other_checkpoint
from m3cli.jobs.space import find_free_bytes
from m3cli.records import RunPlan
from m3cli.store.entries import read_entries, read_run


def plan_corpus(request: EncodeRequest, *, stdin: PeekableStream | None = None) -> RunPlan:
    """Say what an encode with these settings would do, and what it would find done."""
    sources = find_sources(request.inputs, input_format=request.input_format, stdin=stdin)
    out = choose_out(request, sources)
    document = read_run(out)
    if document is None:
        run, done = settle(request, sources, stdin), 0
    else:
        run = adopt_run(parse_run(document), request, sources=sources, out=out.name)
        done = len(read_entries(out)[0])
    checkpoint = open_checkpoint(request)
    refuse_other_checkpoint(run, checkpoint, out=out.name)
    plan, form = plan_run(run), make_form(run)
    estimate = estimate_corpus(run, form, load_tokenizer(checkpoint))
    described = describe_run(
        run,
        out=str(out),
        device=machine.resolve_device(request.device),
        estimate=estimate,
        num_shards=len(plan.shards) if plan.complete else None,
        shards_done=done,
        resumed=document is not None,
    )
    if estimate is None or "colbert" not in run.meaning.outputs:
        return described
    return replace(described, colbert_choices=estimate_choices(form, estimate))


def describe_run(
    run: Run,
    *,
    out: str,
    device: str,
    estimate: Estimate | None,
    num_shards: int | None,
    shards_done: int,
    resumed: bool,
) -> RunPlan:
    """Put together what the panel before a run shows."""
    meaning = run.meaning
    sizes = [source.size for source in run.sources]
    return RunPlan(
        out=out,
        model=run.model,
        dtype=meaning.dtype,
        device=device,
        max_length=meaning.max_length,
        outputs=meaning.outputs,
        format=meaning.format,
        fingerprint=run.fingerprint,
        documents=estimate.documents if estimate else None,
        tokens=estimate.tokens if estimate else None,
        input_bytes=sum(sizes) if min(sizes) >= 0 else None,
        num_shards=num_shards,
        shards_done=shards_done,
        bytes_on_disk=estimate.bytes_on_disk if estimate else None,
        free_bytes=find_free_bytes(Path(out)),
        colbert_choices=None,
        resumed=resumed,
    )

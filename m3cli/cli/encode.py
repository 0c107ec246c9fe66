"""`m3 encode`: flags to a request."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, get_args

import typer

from m3cli.cli import options
from m3cli.cli.options import (
    DTYPES,
    auto,
    check_choices,
    parse_duration,
    parse_max_skipped,
    parse_names,
    parse_outputs,
    parse_size,
    parse_worker,
)
from m3cli.cli.signals import limit_runtime, stop
from m3cli.cli.terminal import open_stdin, print_json, show_run
from m3cli.config import ColbertDtype, EncodeRequest, Format, LongDocs, Split, VectorCompression, VectorDtype

_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(Format),
    "long_docs": get_args(LongDocs),
    "split": get_args(Split),
    "dtype": DTYPES,
    "dense_dtype": get_args(VectorDtype),
    "colbert_dtype": get_args(ColbertDtype),
    "compression": get_args(VectorCompression),
}


def encode(
    inputs: options.Inputs,
    *,
    out: options.Out = None,
    model: options.Model = None,
    revision: options.Revision = None,
    outputs: options.Outputs = None,
    format: options.Format = None,  # noqa: A002  the flag's name
    dense_dtype: options.DenseDtype = None,
    colbert_dtype: options.ColbertDtype = None,
    colbert_pool: options.ColbertPool = None,
    colbert_top_k: options.ColbertTopK = None,
    compression: options.Compression = None,
    input_format: options.InputFormat = "auto",
    id_field: options.IdField = None,
    text_field: options.TextField = None,
    title_field: options.TitleField = None,
    title_sep: options.TitleSep = None,
    keep_fields: options.KeepFields = None,
    keep_text: options.KeepText = None,
    prefix: options.Prefix = None,
    limit: options.Limit = None,
    max_row_bytes: options.MaxRowBytes = None,
    max_length: options.MaxLength = None,
    long_docs: options.LongDocs = None,
    overlap: options.Overlap = None,
    split: options.Split = None,
    mcls: options.Mcls = None,
    dtype: options.DtypeName = None,
    device: options.Device = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    shard_size: options.ShardSize = None,
    worker: options.Worker = None,
    verify_input: options.VerifyInput = False,
    no_space_check: options.NoSpaceCheck = False,
    since_run: options.SinceRun = None,
    gone: options.Gone = None,
    dedupe: options.Dedupe = None,
    max_skipped: options.MaxSkipped = None,
    max_runtime: options.MaxRuntime = None,
    progress: options.ProgressMode = "auto",
    metrics: options.Metrics = None,
    log_file: options.LogFile = None,
) -> None:
    """Encode a corpus into a folder of vectors; run again, it goes on where it stopped.

    A flag that is not given is taken from the folder if it has been begun, or else has its default.
    """
    number, num_workers = parse_worker(worker)
    seconds = parse_duration("--max-runtime", max_runtime)
    request = make_request(
        inputs=tuple(inputs),
        out=out,
        model=model,
        revision=revision,
        outputs=parse_outputs(outputs),
        format=format,
        dense_dtype=dense_dtype,
        colbert_dtype=colbert_dtype,
        colbert_pool=colbert_pool,
        colbert_top_k=colbert_top_k,
        compression=compression,
        input_format=input_format,
        id_field=id_field,
        text_field=text_field,
        title_field=title_field,
        title_sep=title_sep,
        keep_fields=parse_names(keep_fields),
        keep_text=keep_text,
        prefix=prefix,
        limit=limit,
        max_row_bytes=parse_size("--max-row-bytes", max_row_bytes),
        max_length=max_length,
        long_docs=long_docs,
        overlap=overlap,
        split=split,
        mcls=mcls,
        dtype=auto(dtype),
        device=auto(device),
        max_batch_tokens=max_batch_tokens,
        shard_size=parse_size("--shard-size", shard_size),
        worker=number,
        num_workers=num_workers,
        since_run=since_run,
        gone=gone,
        dedupe=dedupe,
        max_skipped=parse_max_skipped(max_skipped),
        metrics=metrics,
        log_file=log_file,
        verify_input=verify_input,
        space_check=not no_space_check,
    )
    from m3cli.jobs.encode.command import encode_corpus  # noqa: PLC0415  pyarrow, not for --help

    with limit_runtime(seconds, spelt=max_runtime or ""), show_run(progress) as shown:
        code = encode_corpus(request, progress=shown, stdin=open_stdin(inputs), stop=stop)
    raise typer.Exit(code)


def make_request(**typed: Any) -> EncodeRequest:
    """Check choices and make the request."""
    check_choices(typed, _CHOICES)
    return EncodeRequest(**typed)


def plan(
    inputs: options.Inputs,
    *,
    out: options.Out = None,
    model: options.Model = None,
    revision: options.Revision = None,
    outputs: options.Outputs = None,
    format: options.Format = None,  # noqa: A002  the flag's name
    dense_dtype: options.DenseDtype = None,
    colbert_dtype: options.ColbertDtype = None,
    colbert_pool: options.ColbertPool = None,
    colbert_top_k: options.ColbertTopK = None,
    compression: options.Compression = None,
    input_format: options.InputFormat = "auto",
    id_field: options.IdField = None,
    text_field: options.TextField = None,
    title_field: options.TitleField = None,
    title_sep: options.TitleSep = None,
    keep_fields: options.KeepFields = None,
    keep_text: options.KeepText = None,
    prefix: options.Prefix = None,
    limit: options.Limit = None,
    max_row_bytes: options.MaxRowBytes = None,
    max_length: options.MaxLength = None,
    long_docs: options.LongDocs = None,
    overlap: options.Overlap = None,
    split: options.Split = None,
    mcls: options.Mcls = None,
    dtype: options.DtypeName = None,
    device: options.Device = None,
    shard_size: options.ShardSize = None,
    since_run: options.SinceRun = None,
    dedupe: options.Dedupe = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what an encode would do: shards, documents, tokens, bytes on disk, and what is done already.

    Nothing is written. Documents and tokens are estimated from a sample of the input.
    """
    request = make_request(
        inputs=tuple(inputs),
        out=out,
        model=model,
        revision=revision,
        outputs=parse_outputs(outputs),
        format=format,
        dense_dtype=dense_dtype,
        colbert_dtype=colbert_dtype,
        colbert_pool=colbert_pool,
        colbert_top_k=colbert_top_k,
        compression=compression,
        input_format=input_format,
        id_field=id_field,
        text_field=text_field,
        title_field=title_field,
        title_sep=title_sep,
        keep_fields=parse_names(keep_fields),
        keep_text=keep_text,
        prefix=prefix,
        limit=limit,
        max_row_bytes=parse_size("--max-row-bytes", max_row_bytes),
        max_length=max_length,
        long_docs=long_docs,
        overlap=overlap,
        split=split,
        mcls=mcls,
        dtype=auto(dtype),
        device=auto(device),
        shard_size=parse_size("--shard-size", shard_size),
        since_run=since_run,
        dedupe=dedupe,
    )
    from m3cli.jobs.plan import plan_corpus  # noqa: PLC0415  pyarrow and torch, not for --help
    from m3cli.tables import plan_panel, print_panel  # noqa: PLC0415

    found = plan_corpus(request, stdin=open_stdin(inputs))
    if as_json:
        print_json(asdict(found))
    else:
        print_panel(plan_panel(found, title="m3 plan"), sys.stdout)

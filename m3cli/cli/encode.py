"""`m3 encode`: flags to a request."""

from __future__ import annotations

from typing import Any, get_args

import typer

from m3cli.cli import flags
from m3cli.cli.signals import limit_runtime, stop
from m3cli.cli.terminal import open_stdin, show_run
from m3cli.cli.values import (
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
    inputs: flags.Inputs,
    *,
    out: flags.Out = None,
    model: flags.Model = None,
    revision: flags.Revision = None,
    outputs: flags.Outputs = None,
    format: flags.Format = None,  # noqa: A002  the flag's name
    dense_dtype: flags.DenseDtype = None,
    colbert_dtype: flags.ColbertDtype = None,
    colbert_pool: flags.ColbertPool = None,
    colbert_top_k: flags.ColbertTopK = None,
    compression: flags.Compression = None,
    input_format: flags.InputFormat = "auto",
    id_field: flags.IdField = None,
    text_field: flags.TextField = None,
    title_field: flags.TitleField = None,
    title_sep: flags.TitleSep = None,
    keep_fields: flags.KeepFields = None,
    keep_text: flags.KeepText = None,
    prefix: flags.Prefix = None,
    limit: flags.Limit = None,
    max_row_bytes: flags.MaxRowBytes = None,
    max_length: flags.MaxLength = None,
    long_docs: flags.LongDocs = None,
    overlap: flags.Overlap = None,
    split: flags.Split = None,
    mcls: flags.Mcls = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    max_batch_tokens: flags.MaxBatchTokens = None,
    shard_size: flags.ShardSize = None,
    worker: flags.Worker = None,
    verify_input: flags.VerifyInput = False,
    no_space_check: flags.NoSpaceCheck = False,
    since_run: flags.SinceRun = None,
    gone: flags.Gone = None,
    dedupe: flags.Dedupe = None,
    max_skipped: flags.MaxSkipped = None,
    max_runtime: flags.MaxRuntime = None,
    progress: flags.ProgressMode = "auto",
    metrics: flags.Metrics = None,
    log_file: flags.LogFile = None,
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
    from m3cli.jobs.encode import encode_corpus  # noqa: PLC0415  pyarrow, not for --help

    with limit_runtime(seconds, spelt=max_runtime or ""), show_run(progress) as shown:
        code = encode_corpus(request, progress=shown, stdin=open_stdin(inputs), stop=stop)
    raise typer.Exit(code)


def make_request(**typed: Any) -> EncodeRequest:
    """Check choices and make the request."""
    check_choices(typed, _CHOICES)
    return EncodeRequest(**typed)

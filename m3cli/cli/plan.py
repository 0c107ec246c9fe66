"""`m3 plan`: what an encode would do, without doing it."""

from __future__ import annotations

import sys
from dataclasses import asdict

from m3cli.cli import flags
from m3cli.cli.encode import make_request
from m3cli.cli.terminal import open_stdin, print_json
from m3cli.cli.values import auto, parse_names, parse_outputs, parse_size


def plan(
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
    shard_size: flags.ShardSize = None,
    since_run: flags.SinceRun = None,
    dedupe: flags.Dedupe = None,
    as_json: flags.AsJson = False,
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
    from m3cli.panel import plan_panel, print_panel  # noqa: PLC0415

    found = plan_corpus(request, stdin=open_stdin(inputs))
    if as_json:
        print_json(asdict(found))
    else:
        print_panel(plan_panel(found, title="m3 plan"), sys.stdout)

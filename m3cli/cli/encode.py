"""`m3 encode`: flags to a request."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, get_args

import typer

from m3cli.cli import flags
from m3cli.cli.values import auto, parse_names, parse_outputs, parse_size, parse_worker
from m3cli.config import Dtype, EncodeRequest, Format, LongDocs, VectorDtype
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from m3cli.corpus.streams import PeekableStream

_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(Format),
    "long_docs": get_args(LongDocs),
    "dtype": get_args(Dtype),
    "dense_dtype": get_args(VectorDtype),
    "progress": ("auto", "bar", "log", "json", "none"),
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
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    max_batch_tokens: flags.MaxBatchTokens = None,
    shard_size: flags.ShardSize = None,
    worker: flags.Worker = None,
    progress: flags.ProgressMode = "auto",
) -> None:
    """Encode a corpus into a folder of vectors; run again, it goes on where it stopped.

    A flag that is not given is taken from the folder if it has been begun, or else has its default.
    """
    number, num_workers = parse_worker(worker)
    check_choices({"progress": progress})
    request = make_request(
        inputs=tuple(inputs),
        out=out,
        model=model,
        revision=revision,
        outputs=parse_outputs(outputs),
        format=format,
        dense_dtype=dense_dtype,
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
        dtype=auto(dtype),
        device=auto(device),
        max_batch_tokens=max_batch_tokens,
        shard_size=parse_size("--shard-size", shard_size),
        worker=number,
        num_workers=num_workers,
    )
    from m3cli.jobs.encode import encode_corpus  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import Progress  # noqa: PLC0415

    code = encode_corpus(request, progress=Progress(progress), stdin=open_stdin(inputs))  # type: ignore[arg-type]
    raise typer.Exit(code)


def make_request(**typed: Any) -> EncodeRequest:
    """Check choices and make the request."""
    check_choices(typed)
    return EncodeRequest(**typed)


def check_choices(typed: dict[str, Any]) -> None:
    """Refuse a value that is none of a flag's choices."""
    for name, choices in _CHOICES.items():
        value = typed.get(name)
        if value is not None and value not in choices:
            raise UsageError(f"--{name.replace('_', '-')} {value!r}: expected {', '.join(choices)}")


def open_stdin(inputs: list[str]) -> PeekableStream | None:
    """Open standard input if it is among the inputs."""
    from m3cli.corpus.streams import PeekableStream  # noqa: PLC0415  pyarrow, not for --help

    return PeekableStream(sys.stdin.buffer) if "-" in inputs else None

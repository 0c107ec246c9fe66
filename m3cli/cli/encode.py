"""`m3 encode`: flags to a request."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import typer

from m3cli.cli import flags
from m3cli.cli.signals import limit_runtime, stop
from m3cli.cli.values import (
    auto,
    parse_duration,
    parse_max_skipped,
    parse_names,
    parse_outputs,
    parse_size,
    parse_worker,
)
from m3cli.config import ColbertDtype, Dtype, EncodeRequest, Format, LongDocs, Split, VectorCompression, VectorDtype
from m3cli.errors import EXIT_INTERRUPTED, M3Error, UsageError

if TYPE_CHECKING:
    from m3cli.corpus.streams import PeekableStream
    from m3cli.progress import Progress

_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(Format),
    "long_docs": get_args(LongDocs),
    "split": get_args(Split),
    "dtype": get_args(Dtype),
    "dense_dtype": get_args(VectorDtype),
    "colbert_dtype": get_args(ColbertDtype),
    "compression": get_args(VectorCompression),
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
    check_choices({"progress": progress})
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
        verify_input=verify_input,
        space_check=not no_space_check,
    )
    from m3cli.jobs.encode import encode_corpus  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import Progress  # noqa: PLC0415

    shown = Progress(progress, log_file=log_file)  # type: ignore[arg-type]
    with limit_runtime(seconds, spelt=max_runtime or ""), tell_end(shown):
        code = encode_corpus(request, progress=shown, stdin=open_stdin(inputs), stop=stop)
    raise typer.Exit(code)


@contextmanager
def tell_end(progress: Progress) -> Iterator[None]:
    """Let warnings and a bad end go the way of all that is shown of a run; as JSON, nothing else is printed."""
    logger = logging.getLogger("m3cli")
    handler = _ToProgress(progress)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    except (M3Error, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = error.exit_code if isinstance(error, M3Error) else EXIT_INTERRUPTED
        if progress.fail("interrupted" if interrupted else str(error), code):
            raise typer.Exit(code) from error
        raise
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


class _ToProgress(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(record.getMessage())


def make_request(**typed: Any) -> EncodeRequest:
    """Check choices and make the request."""
    check_choices(typed)
    return EncodeRequest(**typed)


def check_choices(typed: Mapping[str, Any], choices_of: Mapping[str, Sequence[str]] = _CHOICES) -> None:
    """Refuse a value that is none of a flag's choices."""
    for name, choices in choices_of.items():
        value = typed.get(name)
        if value is not None and value not in choices:
            raise UsageError(f"--{name.replace('_', '-')} {value!r}: expected {', '.join(choices)}")


def open_stdin(inputs: list[str]) -> PeekableStream | None:
    """Open standard input if it is among the inputs."""
    from m3cli.corpus.streams import PeekableStream  # noqa: PLC0415  pyarrow, not for --help

    return PeekableStream(sys.stdin.buffer) if "-" in inputs else None

"""`m3 export`, `m3 load` and `m3 convert`: vectors for databases, a checkpoint for queries."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from m3cli.cli.options import takes
from m3cli.cli.terminal import show_run, stop
from m3cli.errors import count_noun
from m3cli.requests import ConvertRequest, ExportRequest, LoadRequest


@takes(ExportRequest)
def export(request: ExportRequest) -> None:
    """Write a finished folder as files that load into a database or search engine. The same command again resumes.

    What the target cannot hold is listed in left-out.jsonl, and the exit code is 3.
    """
    from m3cli.jobs.export import export_folder  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import FileMeter  # noqa: PLC0415
    from m3cli.tables import format_bytes  # noqa: PLC0415

    quiet = request.progress == "none"
    done = export_folder(request, meter=FileMeter(quiet=quiet))
    size = format_bytes(done.bytes)
    words = f"{request.out}: {count_noun(done.rows, 'row')} in {count_noun(done.parts, 'part')}, {size}"
    print_summary(words, done.rows_left_out, done.left_out, where=f"{request.out}/left-out.jsonl", quiet=quiet)
    raise typer.Exit(done.exit_code)


def print_summary(words: str, rows: int, reasons: dict[str, int], *, where: str, quiet: bool) -> None:
    """Print what was done, and what was left out by reason, to stderr."""
    if quiet:
        return
    lines = [words]
    if reasons:
        lines[0] += f"; {count_noun(rows, 'row')} left out; {where} lists all that is not as it was:"
        lines += [f"  {reason}: {count:,}" for reason, count in reasons.items()]
    sys.stderr.writelines(f"m3: {line}\n" for line in lines)


@takes(LoadRequest)
def load(request: LoadRequest) -> None:
    """Write a finished folder's rows into a running engine, by key: loading again changes nothing.

    A missing collection or table is created. What the engine cannot hold is listed, and the exit code is 3.
    """
    from m3cli.jobs.load import load_folder  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import FileMeter  # noqa: PLC0415

    quiet = request.progress == "none"
    listed = Path(request.left_out or f"{Path(request.folder).resolve().stem}.left-out.jsonl")
    done = load_folder(request, since=request.since, left_out=listed, meter=FileMeter(quiet=quiet), stop=stop)
    words = f"{done.name}: {count_noun(done.rows, 'row')} written"
    if request.since is not None:
        words += f", {done.unchanged:,} unchanged, {done.deleted:,} deleted"
    print_summary(words, done.rows_left_out, done.left_out, where=str(listed), quiet=quiet)
    if done.missing:
        # Not an error: rows that the engine cannot hold are missing too.
        words = f"{done.name} had {count_noun(done.missing, 'row')} fewer than {request.since}"
        sys.stderr.write(f"m3: {words}: unless so many were left out, load again without --since\n")
    if done.others:
        sys.stderr.write(f"m3: {done.name} has {count_noun(done.others, 'row')} of another load, too\n")
    raise typer.Exit(done.exit_code)


@takes(ConvertRequest)
def convert(request: ConvertRequest) -> None:
    """Write a checkpoint as an ONNX model, for queries online with the very model that encoded the corpus.

    Nothing is written unless onnxruntime gives m3's numbers. It needs pip install 'm3cli[onnx]'.
    """
    from m3cli.jobs.convert import convert_checkpoint  # noqa: PLC0415  torch, not for --help

    with show_run(request.progress) as shown:
        convert_checkpoint(request, progress=shown)

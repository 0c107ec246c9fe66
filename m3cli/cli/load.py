"""`m3 load`."""

from __future__ import annotations

from pathlib import Path

import typer

from m3cli.cli.export import print_summary
from m3cli.cli.options import takes
from m3cli.cli.signals import stop
from m3cli.requests import LoadRequest


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
    words = f"{done.name}: {done.rows:,} rows written"
    if request.since is not None:
        words += f", {done.unchanged:,} unchanged, {done.deleted:,} deleted"
    print_summary(words, done.rows_left_out, done.left_out, where=str(listed), quiet=quiet)
    raise typer.Exit(done.exit_code)

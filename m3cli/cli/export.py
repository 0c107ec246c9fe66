"""`m3 export`."""

from __future__ import annotations

import sys

import typer

from m3cli.cli.options import takes
from m3cli.requests import ExportRequest


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
    words = f"{request.out}: {done.rows:,} rows in {done.parts:,} parts, {format_bytes(done.bytes)}"
    print_summary(words, done.rows_left_out, done.left_out, where=f"{request.out}/left-out.jsonl", quiet=quiet)
    raise typer.Exit(done.exit_code)


def print_summary(words: str, rows: int, reasons: dict[str, int], *, where: str, quiet: bool) -> None:
    """Print what was done, and what was left out by reason, to stderr."""
    if quiet:
        return
    lines = [words]
    if reasons:
        lines[0] += f"; {rows:,} rows left out; {where} lists all that is not as it was:"
        lines += [f"  {count:,} {reason}" for reason, count in reasons.items()]
    sys.stderr.writelines(f"m3: {line}\n" for line in lines)

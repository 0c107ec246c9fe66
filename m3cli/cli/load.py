"""`m3 load`: flags to a request, and what was sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m3cli.cli.export import PROGRESS, Fields, Name, Quiet, print_summary
from m3cli.cli.options import check_choices, parse_names, parse_outputs
from m3cli.cli.signals import stop


def load(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that m3 encode wrote.", show_default=False)],
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ENGINE:ADDRESS",
            help="milvus:URI (a file ending in .db: Milvus Lite), pgvector:DSN, qdrant:URL.",
            show_default=False,
        ),
    ],
    outputs: Annotated[
        str | None,
        typer.Option(help="Some of dense,sparse,colbert; by default those that the folder has and the engine holds."),
    ] = None,
    fields: Fields = None,
    name: Name = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="OLD.m3",
            help="Send the rows that are new or changed since this folder was loaded, and delete those that are gone.",
        ),
    ] = None,
    left_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="List of what the engine cannot hold; by default DIR.left-out.jsonl, here."),
    ] = None,
    progress: Quiet = "auto",
) -> None:
    """Write a finished folder's rows into a running engine, by key: loading again changes nothing.

    A missing collection or table is created. What the engine cannot hold is listed, and the exit code is 3.
    """
    check_choices({"progress": progress}, PROGRESS)
    from m3cli.jobs.export import ExportRequest  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.jobs.load import load_folder  # noqa: PLC0415
    from m3cli.progress import FileMeter  # noqa: PLC0415

    request = ExportRequest(folder=folder, to=to, outputs=parse_outputs(outputs), fields=parse_names(fields), name=name)
    listed = Path(left_out or f"{Path(folder).resolve().stem}.left-out.jsonl")
    done = load_folder(request, since=since, left_out=listed, meter=FileMeter(quiet=progress == "none"), stop=stop)
    words = f"{done.name}: {done.rows:,} rows written"
    if since is not None:
        words += f", {done.unchanged:,} unchanged, {done.deleted:,} deleted"
    print_summary(words, done.rows_left_out, done.left_out, where=str(listed), quiet=progress == "none")
    raise typer.Exit(done.exit_code)

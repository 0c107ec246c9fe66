"""`m3 export`: flags to a request, and what was written."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from m3cli.cli import options
from m3cli.cli.options import check_choices, parse_names, parse_outputs

Fields = Annotated[
    str | None,
    typer.Option("--fields", metavar="a,b", help="Kept fields, and 'text', that go along; by default all there are."),
]
Quiet = Annotated[
    str, typer.Option("--progress", help="auto or none: a bar on a terminal, a line now and then off it.")
]
PROGRESS = {"progress": ("auto", "none")}
Name = Annotated[
    str | None, typer.Option("--name", help="Of the collection, table or index; by default that of the folder.")
]


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that m3 encode wrote.", show_default=False)],
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET",
            help="parquet, npy, faiss, milvus, pgvector, lance, elasticsearch, opensearch, vespa.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="Folder to write to.", show_default=False)],
    outputs: Annotated[
        str | None,
        typer.Option(help="Some of dense,sparse,colbert; by default those that the folder has and the target holds."),
    ] = None,
    fields: Fields = None,
    name: Name = None,
    no_space_check: options.NoSpaceCheck = False,
    progress: Quiet = "auto",
) -> None:
    """Write a finished folder as files that load into a database or search engine; run again, it goes on.

    What the target cannot hold is listed in left-out.jsonl, and the exit code is 3.
    """
    check_choices({"progress": progress}, PROGRESS)
    from m3cli.jobs.export import ExportRequest, export_folder  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import FileMeter  # noqa: PLC0415
    from m3cli.tables import format_bytes  # noqa: PLC0415

    request = ExportRequest(
        folder=folder,
        to=to,
        out=out,
        outputs=parse_outputs(outputs),
        fields=parse_names(fields),
        name=name,
        space_check=not no_space_check,
    )
    done = export_folder(request, meter=FileMeter(quiet=progress == "none"))
    words = f"{out}: {done.rows:,} rows in {done.parts:,} parts, {format_bytes(done.bytes)}"
    print_summary(words, done.rows_left_out, done.left_out, where=f"{out}/left-out.jsonl", quiet=progress == "none")
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

"""`m3 info`: what is in a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from m3cli.cli import flags
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from m3cli.jobs.info import ChunkSpan


def info(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that m3 encode wrote.", show_default=False)],
    *,
    document_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Show the chunks of this document, and their spans.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="With --id: their text too.")] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="INPUT", help="With --text: where the input is now, if the folder has no text itself."
        ),
    ] = None,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="List the documents that were cut short: id, tokens, characters kept.")
    ] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Show what is in a folder: settings, counts, bytes per output, and how long its rows are; or of one document."""
    if (text or source) and document_id is None:
        raise UsageError("--text and --input need --id: they are about one document")
    if truncated and document_id is not None:
        raise UsageError(f"--truncated and --id {document_id}: one lists all documents, the other shows one; drop one")
    if source is not None and not text:
        raise UsageError(f"--input {source} needs --text: only the text is read from the input")
    if source == "-":
        raise UsageError("--input -: standard input is not searched for a document; save it, and name the file")
    from m3cli.jobs import info as job  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.panel import info_panel, print_panel  # noqa: PLC0415

    if truncated:
        for row in job.list_truncated(folder):
            _print_row(row, as_json=as_json, names=("id", "num_tokens", "char_end"))
    elif document_id is not None:
        spans = job.find_chunks(folder, document_id, text=text, source=source)
        if as_json:
            sys.stdout.write(orjson.dumps([_as_document(span) for span in spans]).decode() + "\n")
        else:
            _print_spans(spans)
    else:
        found = asdict(job.describe_folder(folder))
        print_panel(info_panel(folder, found), sys.stdout, document=found if as_json else None)


def _as_document(span: ChunkSpan) -> dict[str, Any]:
    return {name: value for name, value in asdict(span).items() if value is not None}


def _print_spans(spans: Sequence[ChunkSpan]) -> None:
    """Print a line a chunk, tabs between its numbers; with text, the text below it."""
    sys.stdout.write("chunk\tcharacters\ttokens\n")
    for span in spans:
        cut = "\ttruncated" if span.truncated else ""
        sys.stdout.write(f"{span.chunk_index}\t{span.char_start}-{span.char_end}\t{span.num_tokens}{cut}\n")
        if span.text is not None:
            sys.stdout.write(f"{span.text.rstrip()}\n\n")


def _print_row(row: Sequence[object], *, as_json: bool, names: Sequence[str]) -> None:
    line = orjson.dumps(dict(zip(names, row, strict=True))).decode() if as_json else "\t".join(map(str, row))
    sys.stdout.write(line + "\n")

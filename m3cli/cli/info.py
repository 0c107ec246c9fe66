"""`m3 info`: what is in a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import orjson
import typer

from m3cli.cli import flags
from m3cli.cli.terminal import open_results, print_json
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
        results = open_results()
        for row in job.list_truncated(folder):
            _print_row(results, row, as_json=as_json, names=("id", "num_tokens", "char_end"))
    elif document_id is not None:
        spans = job.find_chunks(folder, document_id, text=text, source=source)
        if as_json:
            open_results().write(orjson.dumps([_as_document(span) for span in spans], option=orjson.OPT_APPEND_NEWLINE))
        else:
            _print_spans(spans)
    else:
        found = asdict(job.describe_folder(folder))
        if as_json:
            print_json(found)
        else:
            print_panel(info_panel(folder, found), sys.stdout)


def _as_document(span: ChunkSpan) -> dict[str, Any]:
    return {name: value for name, value in asdict(span).items() if value is not None}


def _print_spans(spans: Sequence[ChunkSpan]) -> None:
    """Print a line per chunk, and its text below it; columns line up on a terminal, and have tabs elsewhere."""
    rows = [("chunk", "characters", "tokens", "")]
    for span in spans:
        cut = "truncated" if span.truncated else ""
        rows.append((str(span.chunk_index), f"{span.char_start}-{span.char_end}", str(span.num_tokens), cut))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [None, *(span.text for span in spans)]
    results, aligned = open_results(), sys.stdout.isatty()
    for row, text in zip(rows, texts, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)] if aligned else row
        results.write((("  " if aligned else "\t").join(cells).rstrip() + "\n").encode())
        if text is not None:
            results.write(f"{text.rstrip()}\n\n".encode())


def _print_row(results: BinaryIO, row: Sequence[object], *, as_json: bool, names: Sequence[str]) -> None:
    line = orjson.dumps(dict(zip(names, row, strict=True))) if as_json else "\t".join(map(str, row)).encode()
    results.write(line + b"\n")

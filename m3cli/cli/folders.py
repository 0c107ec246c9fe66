"""`m3 info` and `m3 check`: what is in a folder, and whether it is damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import orjson
import typer

from m3cli.cli.options import AsJson, takes
from m3cli.cli.terminal import open_results, print_json
from m3cli.errors import UsageError, count_noun, escape_unprintable
from m3cli.requests import CheckRequest

if TYPE_CHECKING:
    from m3cli.jobs.check import FolderCheck
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
    as_json: AsJson = False,
) -> None:
    """Show what is in a folder: options, counts, bytes per output, lengths of rows; or one document of it."""
    if (text or source) and document_id is None:
        raise UsageError("--text and --input need --id: they are about one document")
    if truncated and document_id is not None:
        raise UsageError(f"--truncated and --id {document_id}: one lists all documents, the other shows one; drop one")
    if source is not None and not text:
        raise UsageError(f"--input {source} needs --text: only the text is read from the input")
    if source == "-":
        raise UsageError("--input -: standard input is not searched for a document; save it, and name the file")
    from m3cli.jobs import info as job  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.tables import info_panel, print_panel  # noqa: PLC0415

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
    """Print a line for each chunk, and its text below it; columns are aligned on a terminal, else separated by tabs."""
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


@takes(CheckRequest)
def check(request: CheckRequest, *, as_json: AsJson = False) -> None:
    """Read a finished or broken folder back and list every error; no model is needed.

    Exit code 12: there is damage; 75: none, but work remains; 3: complete, and rows were skipped; 0: complete.
    """
    from m3cli.jobs.check import check_folder  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import FileMeter  # noqa: PLC0415

    found = check_folder(request, meter=FileMeter())
    if as_json:
        # Not orjson: a stray file's name may be no UTF-8, and is to be named all the same.
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{escape_unprintable(line)}\n" for line in describe(found, repair=request.repair))
    raise typer.Exit(found.exit_code)


def describe(found: FolderCheck, *, repair: bool) -> list[str]:
    """Return lines that describe the damage: one for each error, then what to do."""
    lines = [
        f"{fault.file}: {fault.what}" + ("" if fault.shard is None else f" (shard {fault.shard})")
        for fault in found.faults
    ]
    twice = found.duplicate_ids
    if twice.count:
        examples = ", ".join(map(repr, twice.examples))
        lines.append(f"note: {count_noun(twice.count, 'id occurs', 'ids occur')} more than once, such as {examples}")
    lines += [f"note: {name}: m3 did not write it, and leaves it alone" for name in found.unknown]
    if found.redo:
        lines.append(f"shards to do again: {', '.join(map(str, found.redo))}")
    if repair and found.faults:
        lines.append(f"removed {count_noun(len(found.removed), 'file')}")
    if any(fault.cure == "none" for fault in found.faults):
        lines.append(
            "what --repair cannot fix: "
            + ", ".join(sorted({fault.file for fault in found.faults if fault.cure == "none"}))
            + "; put it back from a copy or take it away by hand, or encode again into a new --out"
        )
    lines.append(_verdict(found, repair=repair))
    return lines


def _verdict(found: FolderCheck, *, repair: bool) -> str:
    documents = count_noun(found.documents, "document")
    what = (
        f"{found.folder}: {count_noun(found.num_shards, 'shard')} done, {documents} in {count_noun(found.rows, 'row')}"
    )
    if found.sampled:
        what += f", {count_noun(found.sampled, 'row')} encoded again"
    if found.faults and not repair:
        return (
            f"{what}; {count_noun(len(found.faults), 'fault')}; --repair drops what is damaged, m3 encode does it again"
        )
    state = {
        0: "complete, no damage",
        3: f"complete, no damage, {count_noun(found.skipped, 'row was', 'rows were')} skipped",
        75: "work is left: run m3 encode again",
    }
    return f"{what}; {state.get(found.exit_code, 'damage is left')}"

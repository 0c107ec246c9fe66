"""`m3 info`, `m3 check` and `m3 doctor`: what is in a folder, whether it is damaged, and what this machine can do."""

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
from m3cli.config import ModelChoice
from m3cli.errors import EXIT_DONE, ModelError, UsageError, count_noun, escape_unprintable
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
    """Read a finished or broken folder back and list every error. Only --sample needs the model.

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


@takes(ModelChoice)
def doctor(request: ModelChoice, *, as_json: AsJson = False) -> None:
    """Report what this machine and this checkpoint can do, and recompute the model card's published scores.

    The exit code is 5 if a published figure is not reached.
    """
    from m3cli.jobs.doctor import examine  # noqa: PLC0415  torch, not for --help

    report = examine(model=request.model, revision=request.revision, device=request.device)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    failed = any(figure["status"] == "fail" for figure in report["card"])
    raise typer.Exit(ModelError.exit_code if failed else EXIT_DONE)


def _print_report(report: dict[str, Any]) -> None:
    from m3cli.tables import draw_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    console.print(draw_table("machine", _machine_lines(report["machine"])))
    if report["checkpoint"] is None:
        console.print(draw_table("checkpoint", [("none", report["problem"])]))
        return
    console.print(draw_table("checkpoint", _checkpoint_lines(report["checkpoint"])))
    advice = report["recommendation"]
    console.print(
        draw_table(
            "recommendation",
            [
                (
                    "options",
                    f"--dtype {advice['dtype']} --max-batch-tokens {advice['max_batch_tokens']} (what auto takes)",
                ),
                ("expect", f"{advice['tokens_per_second']:,} tokens/s at {advice['passage_tokens']} tokens a passage"),
            ],
        )
    )
    console.print(_card_table(report["card"], judged=report["checkpoint"]["is_bge_m3"]))


def _machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    from m3cli.tables import format_bytes  # noqa: PLC0415

    lines = []
    for device in found["devices"]:
        counts = [count_noun(device[f"{one}s"], one) for one in ("core", "thread") if f"{one}s" in device]
        cores = "".join(f", {count}" for count in counts)
        dtypes = ", ".join(device["hardware_dtypes"])
        memory = format_bytes(device["memory_bytes"])
        lines.append((device["device"], f"{device['name']}{cores}, {memory}; in hardware: {dtypes}"))
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in found["matmul_flops_per_second"].items())
    lines.append(("matmul", f"{rates} GFLOP/s on {found['device']}"))
    lines.append(("attention", found["attention"]))
    rate = found["disk_bytes_per_second"]
    written = "64 MiB cannot be written" if rate is None else f"{format_bytes(rate)}/s written"
    lines.append(("disk", f"{written} to {found['disk_folder']}"))
    return lines


def _checkpoint_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    revision = f", revision {found['revision']}" if found["revision"] else ""
    files = "; ".join(f"{name} ({kind})" for name, kind in found["files"].items())
    return [
        ("name", f"{found['name']}{revision}"),
        ("shape", f"{found['layers']} layers, {found['width']} wide, {found['attention_heads']} attention heads"),
        ("vocabulary", f"{found['vocabulary']:,}"),
        ("outputs", f"{', '.join(found['outputs'])}; pooling {found['pooling']}"),
        ("max length", f"{found['max_length']:,} tokens ({found['positions']:,} positions)"),
        ("files", files),
    ]


def _card_table(card: list[dict[str, Any]], *, judged: bool) -> Any:
    from m3cli.tables import draw_table  # noqa: PLC0415

    passed = sum(figure["status"] == "pass" for figure in card)
    count = sum(figure["status"] != "not this model" for figure in card)
    what = "" if judged else "; scores are BAAI/bge-m3's own and not judged for another model"
    rows = [
        [figure["name"], str(figure["published"]), _format_figure(figure["found"]), figure["status"]] for figure in card
    ]
    title = f"model card: {passed} of {count} pass{what}"
    return draw_table(title, rows, columns=["figure", "published", "here", "status"])


def _format_figure(found: object) -> str:
    return "no such head" if found is None else str(found)

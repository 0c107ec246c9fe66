"""`m3 check`: what is wrong with a folder, one line each."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.cli import flags
from m3cli.cli.values import auto
from m3cli.config import CheckRequest
from m3cli.errors import count_noun, spell_printable

if TYPE_CHECKING:
    from m3cli.jobs.check import FolderCheck


def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that m3 encode wrote.", show_default=False)],
    *,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Remove the files of damaged shards, so that the next m3 encode does them again; other files "
            "than m3's stay.",
        ),
    ] = False,
    sample: Annotated[int, typer.Option(min=0, help="Encode N rows again from the input and compare them.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Which rows --sample takes.")] = 0,
    model: flags.Model = None,
    revision: flags.Revision = None,
    device: flags.Device = None,
    as_json: flags.AsJson = False,
) -> None:
    """Read a finished or broken folder back and list every fault; no model is needed.

    Exit code 12: there is damage; 75: none, but work is left; 3: complete, and rows were skipped; 0: complete.
    """
    request = CheckRequest(
        folder=folder,
        repair=repair,
        sample=sample,
        seed=seed,
        model=model,
        revision=revision,
        device=auto(device),
    )
    from m3cli.jobs.check import check_folder  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import FileMeter  # noqa: PLC0415

    found = check_folder(request, meter=FileMeter())
    if as_json:
        # Not orjson: a stray file's name may be no UTF-8, and is to be named all the same.
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{spell_printable(line)}\n" for line in describe(found, repair=repair))
    raise typer.Exit(found.exit_code)


def describe(found: FolderCheck, *, repair: bool) -> list[str]:
    """Spell out what was found: a line for each fault, then what to do."""
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

"""`m3 info`: what is in a folder."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from m3cli.cli import flags


def info(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that m3 encode wrote.", show_default=False)],
    *,
    as_json: flags.AsJson = False,
) -> None:
    """Show what is in a folder: settings, counts, bytes per output, and how long its rows are."""
    from m3cli.jobs.info import describe_folder  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.panel import info_panel, print_panel  # noqa: PLC0415

    found = asdict(describe_folder(folder))
    print_panel(info_panel(folder, found), sys.stdout, document=found if as_json else None)

"""Format tables as aligned text or Markdown, and write results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

EMPTY = "-"


def draw_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool) -> str:
    """Return a table, its first column left-aligned and the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    if markdown:
        marks = ["---", *["---:"] * (len(header) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], marks, *lines[1:]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(both)
        ).rstrip()
        for both in (list(zip(cells, widths, strict=True)) for cells in lines)
    )


def format_bytes(count: float) -> str:
    """Format bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_share(share: float | None) -> str:
    """Format a share in per cent."""
    return EMPTY if share is None else f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


def describe_machine() -> dict[str, Any]:
    """Return the machine and the versions."""
    return {
        "cpu": _read_cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, with the date and the machine."""
    date = datetime.now(timezone.utc).date().isoformat()
    document = {"date": date, "machine": describe_machine(), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def make_parser(doc: str | None, *, needs_model: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that all benches of a model share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if needs_model:
        parser.add_argument("--model", required=True, type=Path)
        parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--markdown", action="store_true")
    return parser


def _read_cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

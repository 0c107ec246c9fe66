"""Tables of what was found, as aligned text or Markdown, and where results are kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from m3cli.encoder.measure import list_devices

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


def show_bytes(count: float) -> str:
    """Write bytes as people read them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def show_share(share: float | None) -> str:
    """Write a share in per cent."""
    return EMPTY if share is None else f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


def describe_machine() -> dict[str, Any]:
    """Say what everything was measured on."""
    return {
        "cpu": list_devices()[0],
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

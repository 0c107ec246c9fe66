"""Whether the disk has room for what a run is about to write: said before it begins, not hours later.

The estimate is on the high side and for the whole folder, whatever share of it this run does: other workers write to
the same disk. What is done already is taken off by shards, which hold about the same bytes each, or by its bytes where
the number of shards is not known (compressed input). Where nothing can be estimated (standard input) none is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from m3cli.errors import OutputError
from m3cli.records import DoneEntry


def find_free_bytes(folder: Path) -> int:
    """Return what the disk has free that a folder is on, or will be once it is made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def count_needed(sizes: Mapping[str, int], *, num_shards: int | None, done: Mapping[int, DoneEntry]) -> int:
    """Count the bytes that are still to be written, of those that the whole folder takes."""
    total = sum(sizes.values())
    if num_shards:
        return total * max(0, num_shards - len(done)) // num_shards
    return max(0, total - sum(file.length for entry in done.values() for file in entry.files))


def refuse_full_disk(
    folder: Path,
    sizes: Mapping[str, int],
    *,
    num_shards: int | None,
    done: Mapping[int, DoneEntry],
    choices: Mapping[str, int] | None = None,
) -> None:
    """Refuse to begin where what is left to do will not fit.

    Args:
        folder: that is written to.
        sizes: bytes of each output of the whole folder.
        num_shards: of the whole folder; None: not known yet.
        done: the shards that are done.
        choices: bytes of the ColBERT vectors by the flags that would store them so; None: there is no choice any more.

    Raises:
        OutputError: naming what is needed and what there is.
    """
    need, free = count_needed(sizes, num_shards=num_shards, done=done), find_free_bytes(folder)
    if need <= free:
        return
    from m3cli.panel import format_bytes  # noqa: PLC0415  rich, only for this

    rest = need - sizes.get("colbert", 0)
    smaller = next((flags for flags, size in (choices or {}).items() if rest + size <= free), None)
    raise OutputError(
        f"{folder} needs about {format_bytes(need)} more and its disk has {format_bytes(free)} free; "
        f"free some space, choose another --out, {f'try {smaller}, ' if smaller else ''}"
        "or go on all the same with --no-space-check"
    )

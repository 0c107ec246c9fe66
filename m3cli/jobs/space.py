"""Whether the disk has room for what a run is about to write: said before it begins, not hours later.

The estimate is on the high side and for the whole folder; what is done already is taken off by shards, which hold
about the same bytes each, or by its bytes where the number of shards is not known (compressed input). Where nothing can
be estimated (standard input) nothing is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from m3cli.errors import OutputError


def find_free_bytes(folder: Path) -> int:
    """Return what the disk has free that a folder is on, or will be once it is made."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def refuse_full_disk(
    folder: Path, sizes: dict[str, int], *, todo: int | None, num_shards: int | None, bytes_done: int
) -> None:
    """Refuse to begin where what is left to do will not fit.

    Raises:
        OutputError: naming what is needed and what there is.
    """
    total = sum(sizes.values())
    need = total * todo // num_shards if todo is not None and num_shards else total - bytes_done
    free = find_free_bytes(folder)
    if need > free:
        from m3cli.panel import format_bytes  # noqa: PLC0415  rich, only for this

        raise OutputError(
            f"{folder} needs about {format_bytes(need)} more and its disk has {format_bytes(free)} free; "
            "free some space, choose another --out, or go on all the same with --no-space-check"
        )

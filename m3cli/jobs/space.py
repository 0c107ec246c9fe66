"""Whether the disk has room for what a run is about to write: said before it begins, not hours later.

The estimate is on the high side and for the whole folder; what is done already is taken off by shards, which hold
about the same bytes each. Where nothing can be estimated (input that can only be streamed) nothing is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from m3cli.errors import OutputError


def refuse_full_disk(folder: Path, sizes: dict[str, int], *, todo: int | None, num_shards: int | None) -> None:
    """Refuse to begin where the shards left to do will not fit.

    Raises:
        OutputError: naming what is needed and what there is.
    """
    if not todo or not num_shards:
        return
    need = sum(sizes.values()) * todo // num_shards
    free = shutil.disk_usage(folder).free
    if need > free:
        from m3cli.panel import format_bytes  # noqa: PLC0415  rich, only for this

        raise OutputError(
            f"{folder} needs about {format_bytes(need)} more and its disk has {format_bytes(free)} free; "
            "free some space, choose another --out, or go on all the same with --no-space-check"
        )

"""Takes damaged shards away, so that the next run does them again: manifest first, then entries, then data.

Each of the three is durable before the next begins: whatever stops a repair, no manifest is left that counts on a
shard that is gone, and no entry without its data. Shards without a fault are not touched. The caller holds the lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m3cli.store.commit import withdraw_files
from m3cli.store.layout import DATA_NAMES, MANIFEST_NAME, done_name
from m3cli.store.verify.faults import Fault


def shards_to_redo(faults: Sequence[Fault]) -> list[int]:
    """Name the shards that are to be done again."""
    return sorted({fault.shard for fault in faults if fault.cure == "redo" and fault.shard is not None})


def repair(root: Path, faults: Sequence[Fault]) -> list[str]:
    """Remove what is damaged, of files that m3 names itself; return the names of what was removed."""
    shards = shards_to_redo(faults)
    has_lost_manifest = shards or any(fault.cure == "manifest" for fault in faults)
    gone = withdraw_files(root, [MANIFEST_NAME] if has_lost_manifest else [])
    gone += withdraw_files(root, [done_name(index) for index in shards])
    gone += withdraw_files(root, [spell(index) for index in shards for spell in DATA_NAMES])
    gone += withdraw_files(root, [fault.file for fault in faults if fault.cure == "remove"])
    return gone

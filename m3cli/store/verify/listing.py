"""What lies in a folder that nothing names.

Looked through are the data folders and `_m3`; a folder may have other things beside them (a README, a dataset card).
Data of a shard without an entry is not damage while work is left: its run died between the two, or is at it now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from m3cli.store.layout import (
    DATA_NAMES,
    DONE_FOLDER,
    LOCK_NAME,
    MANIFEST_NAME,
    META,
    METRICS_NAME,
    RUN_NAME,
    TMP_FOLDER,
    VECTOR_COLUMNS,
    done_name,
)
from m3cli.store.verify.faults import Fault
from m3cli.store.verify.ledger import Ledger

SHARD_FOLDERS = ("rows", *VECTOR_COLUMNS.values(), DONE_FOLDER, f"{META}/skipped", f"{META}/hashes")
_META_FOLDERS = {Path(name).name for name in (*SHARD_FOLDERS, TMP_FOLDER) if name.startswith(f"{META}/")} | {"logs"}
_META_FILES = {Path(name).name for name in (RUN_NAME, MANIFEST_NAME, METRICS_NAME, LOCK_NAME)}
_STEM = re.compile(r"shard-(\d{7,})\.")


def find_strays(root: Path, ledger: Ledger) -> Iterator[Fault]:
    """List the files and folders that nothing names."""
    yield from _find_in_meta(root)
    for folder in SHARD_FOLDERS:
        for item in _scan(root / folder):
            name = f"{folder}/{item.name}"
            index = _shard_of(name)
            if item.is_dir(follow_symlinks=False):
                yield Fault(file=name, shard=None, what="is a folder where only files belong", cure="none")
            elif index is None:
                yield _stray(name, None, "belongs to no shard")
            elif what := _judge(name, index, ledger):
                yield _stray(name, index, what)


def _find_in_meta(root: Path) -> Iterator[Fault]:
    for item in _scan(root / META):
        name = f"{META}/{item.name}"
        if item.is_dir(follow_symlinks=False):
            if item.name not in _META_FOLDERS:
                yield Fault(file=name, shard=None, what="is a folder that m3 does not make", cure="none")
        elif not (item.name in _META_FILES or item.name.startswith("lock.") or item.name.endswith(".log")):
            yield _stray(name, None, "is a file that m3 does not make")


def _judge(name: str, index: int, ledger: Ledger) -> str | None:
    entry = ledger.entries.get(index)
    if entry is not None:
        named = name == done_name(index) or any(record.name == name for record in entry.files)
        return None if named else f"is not named by the entry of shard {index}"
    if name == done_name(index):  # not believed, which has been said already
        return None
    if ledger.manifest is not None and index >= ledger.manifest.num_shards:
        return f"is of no shard: there are {ledger.manifest.num_shards}"
    return None


def _shard_of(name: str) -> int | None:
    match = _STEM.match(Path(name).name)
    if match is None:
        return None
    index = int(match[1])
    return index if name in {spell(index) for spell in (*DATA_NAMES, done_name)} else None


def _stray(name: str, index: int | None, what: str) -> Fault:
    return Fault(file=name, shard=index, what=what, cure="remove")


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as items:
        return sorted(items, key=lambda item: item.name)

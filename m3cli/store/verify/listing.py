"""Files and folders that no done entry names, and the repair of a folder.

Only the data folders and `_m3` are listed; other files may be next to them (a README, a dataset card). Data of a shard
without an entry is not damage while work remains: a run may be writing it. A file whose name m3 does not use is listed
and never removed. A Parquet file in rows/ is a fault under any name, because readers take it for rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from m3cli.store.commit import remove_files
from m3cli.store.documents import find_links
from m3cli.store.layout import (
    DATA_NAMES,
    MANIFEST_NAME,
    META,
    SHARD_FOLDERS,
    TMP_FOLDER,
    done_name,
    is_meta_name,
    shard_of,
)
from m3cli.store.verify.ledger import IS_LINK, Fault, Ledger

_META_FOLDERS = (TMP_FOLDER, f"{META}/logs", *SHARD_FOLDERS)


def find_strays(root: Path, ledger: Ledger) -> Iterator[Fault]:
    """Yield faults: files with names of m3 that no done entry names, and links instead of its folders."""
    for name in find_links(root):
        if shard_of(name) is None:  # a link instead of a shard's file is a fault of the shard
            yield Fault(file=name, shard=None, what=IS_LINK, cure="none")
    for folder in SHARD_FOLDERS:
        for item in _scan(root / folder):
            name = f"{folder}/{item.name}"
            index = shard_of(name)
            if index is None:
                if folder == "rows" and item.name.endswith(".parquet") and not item.name.startswith((".", "_")):
                    what = "is not a file of m3, and readers of rows/ take it for rows"
                    yield Fault(file=name, shard=None, what=what, cure="none")
            elif item.is_dir(follow_symlinks=False):
                yield Fault(file=name, shard=None, what="is a folder where only files belong", cure="none")
            elif stray := _find_stray(name, index, ledger):
                yield Fault(file=name, shard=index, what=stray, cure="remove")


def find_unknown(root: Path) -> list[str]:
    """Return the files and folders in `_m3` and the data folders whose names m3 does not use."""
    found = []
    for item in _scan(root / META):
        name = f"{META}/{item.name}"
        if not (name in _META_FOLDERS or is_meta_name(name) or name.endswith(".log")):
            found.append(name)
    for folder in SHARD_FOLDERS:
        names = [f"{folder}/{item.name}" for item in _scan(root / folder)]
        found += [name for name in names if shard_of(name) is None]
    return found


def _find_stray(name: str, index: int, ledger: Ledger) -> str | None:
    entry = ledger.entries.get(index)
    if entry is not None:
        named = name == done_name(index) or any(record.name == name for record in entry.files)
        return None if named else f"is not named by the entry of shard {index}"
    if name == done_name(index):  # an invalid entry, which is a fault already
        return None
    if ledger.manifest is not None and index >= ledger.manifest.num_shards:
        return f"is of no shard: there are {ledger.manifest.num_shards}"
    return None


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir() or folder.is_symlink():
        return []
    with os.scandir(folder) as items:
        return sorted(items, key=lambda item: item.name)


def shards_to_redo(faults: Sequence[Fault]) -> list[int]:
    """Return the shards to encode again."""
    return sorted({fault.shard for fault in faults if fault.cure == "redo" and fault.shard is not None})


def repair(root: Path, faults: Sequence[Fault]) -> list[str]:
    """Remove damaged files of m3: the manifest, then done entries, then data; return their names."""
    shards = shards_to_redo(faults)
    outdated = shards or any(fault.cure == "manifest" for fault in faults)
    removed = remove_files(root, [MANIFEST_NAME] if outdated else [])
    removed += remove_files(root, [done_name(index) for index in shards])
    removed += remove_files(root, [name_of(index) for index in shards for name_of in DATA_NAMES])
    removed += remove_files(root, [fault.file for fault in faults if fault.cure == "remove"])
    return removed

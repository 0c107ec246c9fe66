"""Faults of a folder's documents and files, files that no done entry names, and the repair.

Only the data folders and `_m3` are listed; other files may be next to them (a README, a dataset card). Data of a shard
without an entry is not damage while work remains: a run may be writing it. A file whose name m3 does not use is listed
and never removed. A Parquet file in rows/ is a fault under any name, because readers take it for rows.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from m3cli.config import RunConfig
from m3cli.errors import DamageFound
from m3cli.paths import is_folder
from m3cli.records import DoneEntry, FileRecord, Manifest, ShardCounts
from m3cli.store.commit import remove_files
from m3cli.store.documents import (
    UNREADABLE,
    find_links,
    find_misplaced,
    hash_file,
    parse_manifest,
    raise_if_lost,
    read_entry,
    read_errors,
    read_run,
)
from m3cli.store.layout import (
    DATA_NAMES,
    DONE_FOLDER,
    MANIFEST_NAME,
    META,
    RUN_NAME,
    SHARD_FOLDERS,
    TMP_FOLDER,
    done_name,
    is_meta_name,
    shard_of,
)

Cure = Literal["redo", "remove", "manifest", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a folder."""

    file: str
    "path below the folder, with '/'"
    shard: int | None
    "shard of the file, None for a file of the folder"
    what: str
    "message"
    cure: Cure
    "redo: encode the shard again; remove: delete the file; manifest: write it again; none: m3 cannot repair it"


@dataclass(slots=True)
class ShardCheck:
    """Faults of a shard, and the hashes of its ids."""

    index: int
    faults: list[Fault] = field(default_factory=list)
    id_hashes: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, name: str, *found: str) -> None:
        """Add faults of a file."""
        self.faults += [Fault(file=name, shard=self.index, what=what, cure="redo") for what in found]

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Add a fault if a file cannot be parsed."""
        try:
            yield
        except UNREADABLE as error:
            raise_if_lost(error, Path(name))
            self.add(name, f"cannot be read: {' '.join(str(error).split())}")


IS_LINK = "is a symbolic link, which m3 does not make"


def check_files(root: Path, entry: DoneEntry) -> list[Fault]:
    """Return the faults of a shard's files: missing, of another length, of another hash."""
    faults = []
    for record in entry.files:
        what = _check_file(root / record.name, record)
        if what:
            faults.append(Fault(file=record.name, shard=entry.shard.index, what=what, cure="redo"))
    return faults


def _check_file(path: Path, record: FileRecord) -> str | None:
    try:
        with read_errors(path):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                return IS_LINK
            if not stat.S_ISREG(status.st_mode):
                return "is not a file"
            if status.st_size != record.length:
                return f"has {status.st_size:,} bytes, its done entry says {record.length:,}"
            digest = hash_file(path)[1]
    except (FileNotFoundError, DamageFound) as error:
        return "is missing" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{path} ")
    return None if digest == record.xxh3_128 else "has other bytes than its done entry says: its hash differs"


_STEM = re.compile(r"shard-(\d{7,})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Valid documents of a folder, and the faults of the others."""

    run: RunConfig | None
    "None: missing or damaged"
    entries: dict[int, DoneEntry]
    "valid entries, by shard number"
    manifest: Manifest | None
    "None: missing or damaged"
    complete: bool
    "whether there is a manifest, damaged or not"
    faults: tuple[Fault, ...]

    @property
    def counts(self) -> ShardCounts:
        """Sums over the done shards."""
        return sum((entry.counts for entry in self.entries.values()), ShardCounts())


def read_ledger(root: Path) -> Ledger:
    """Read all documents of a folder."""
    complete, manifest, manifest_faults = _read_manifest(root)
    entries, entry_faults = _read_entries(root)
    if manifest is not None:
        entry_faults = _drop_unknown_shards(entries, entry_faults, num_shards=manifest.num_shards)
    run, run_faults = _read_run(root, expected=complete or bool(entries))
    if run is not None:
        what = "counts to a source that run.json does not have"
        entry_faults += [_entry_fault(index, what) for index in find_misplaced(entries, run)]
    crossed = list(_compare(root, manifest, entries, entry_faults, run=run)) if manifest else []
    return Ledger(
        run=run,
        entries=entries,
        manifest=manifest,
        complete=complete,
        faults=(*run_faults, *manifest_faults, *entry_faults, *crossed),
    )


def _read_run(root: Path, *, expected: bool) -> tuple[RunConfig | None, list[Fault]]:
    try:
        run = read_run(root)
    except DamageFound as damage:
        return None, [_run_fault(_reason(damage, root / RUN_NAME))]
    return run, [_run_fault("is missing")] if run is None and expected else []


def _run_fault(what: str) -> Fault:
    return Fault(file=RUN_NAME, shard=None, what=what, cure="none")


def _read_manifest(root: Path) -> tuple[bool, Manifest | None, list[Fault]]:
    path = root / MANIFEST_NAME
    try:
        manifest = parse_manifest(path)
    except FileNotFoundError:
        return False, None, []
    except DamageFound as damage:
        return True, None, [_manifest_fault(_reason(damage, path))]
    return True, manifest, []


def _manifest_fault(what: str) -> Fault:
    return Fault(file=MANIFEST_NAME, shard=None, what=what, cure="manifest")


def _read_entries(root: Path) -> tuple[dict[int, DoneEntry], list[Fault]]:
    entries: dict[int, DoneEntry] = {}
    faults: list[Fault] = []
    for index in _list_entries(root):
        path = root / done_name(index)
        if path.is_symlink():
            faults.append(_entry_fault(index, IS_LINK))
            continue
        try:
            entry = read_entry(path)
        except DamageFound as damage:
            faults.append(_entry_fault(index, _reason(damage, path)))
            continue
        if entry.shard.index == index:
            entries[index] = entry
        else:
            faults.append(_entry_fault(index, f"is the entry of shard {entry.shard.index}"))
    return entries, faults


def _list_entries(root: Path) -> list[int]:
    if not is_folder(root / DONE_FOLDER):
        return []
    names = [f"{DONE_FOLDER}/{path.name}" for path in (root / DONE_FOLDER).iterdir()]
    numbered = [(int(match[1]), name) for name in names if (match := _STEM.fullmatch(Path(name).name))]
    return sorted(index for index, name in numbered if name == done_name(index))


def _drop_unknown_shards(entries: dict[int, DoneEntry], faults: list[Fault], *, num_shards: int) -> list[Fault]:
    """Remove entries of shards that the manifest does not have; each becomes a fault with remedy `remove`."""
    what = f"is of no shard: there are {num_shards}"
    beyond = {index for index in entries if index >= num_shards}
    for index in beyond:
        del entries[index]
    beyond |= {fault.shard for fault in faults if fault.shard is not None and fault.shard >= num_shards}
    unknown = [Fault(file=done_name(index), shard=index, what=what, cure="remove") for index in sorted(beyond)]
    return [fault for fault in faults if fault.shard not in beyond] + unknown


def _entry_fault(index: int, what: str) -> Fault:
    return Fault(file=done_name(index), shard=index, what=what, cure="redo")


def _compare(
    root: Path,
    manifest: Manifest,
    entries: dict[int, DoneEntry],
    known: list[Fault],
    *,
    run: RunConfig | None,
) -> Iterator[Fault]:
    """Compare the manifest with run.json and the done entries."""
    if run is not None and hash_file(root / RUN_NAME)[1] != manifest.run:
        yield _run_fault(f"is not the one that {MANIFEST_NAME} was written for")
    num_shards = manifest.num_shards
    damaged = {fault.shard for fault in known}
    for index in range(num_shards):
        if index in entries:
            if hash_file(root / done_name(index))[1] != manifest.done[index]:
                yield _entry_fault(index, f"is not the one that {MANIFEST_NAME} was written for")
        elif index not in damaged:
            yield _entry_fault(index, "is missing")
    if set(entries) == set(range(num_shards)):
        counts = sum((entry.counts for entry in entries.values()), ShardCounts())
        length = sum(record.length for entry in entries.values() for record in entry.files)
        if (manifest.counts, manifest.length) != (counts, length):
            yield _manifest_fault("does not sum up the done entries")


def _reason(damage: DamageFound, path: Path) -> str:
    name = path.relative_to(path.parents[1]).as_posix()
    return str(damage).removeprefix(f"{path} ").removeprefix(f"_m3/{name} ").removeprefix(f"{name} ")


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
    if not is_folder(folder) or folder.is_symlink():
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

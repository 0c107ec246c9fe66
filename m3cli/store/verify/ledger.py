"""What a folder says of itself: run.json, done entries, manifest, each held against its checksum and the others.

The manifest is read before the entries, and entries before anything lies listed: a run that goes on meanwhile only
adds, so whatever it adds is never taken for damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m3cli.config import RunConfig
from m3cli.errors import DamageFound
from m3cli.records import DoneEntry, Manifest, ShardCounts
from m3cli.store.entries import find_misplaced, parse_manifest, read_entry, read_run
from m3cli.store.layout import DONE_FOLDER, MANIFEST_NAME, RUN_NAME, done_name
from m3cli.store.sealed import hash_file
from m3cli.store.verify.faults import Fault
from m3cli.store.verify.files import IS_LINK

_STEM = re.compile(r"shard-(\d{7,})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What a folder says of itself, as far as it can be believed."""

    run: RunConfig | None
    "None: not there, or damaged"
    entries: dict[int, DoneEntry]
    "those that can be believed, by shard number"
    manifest: Manifest | None
    "None: not there, or damaged"
    complete: bool
    "whether the folder claims to be complete: there is a manifest, damaged or not"
    faults: tuple[Fault, ...]

    @property
    def counts(self) -> ShardCounts:
        """What the done shards hold together."""
        return sum((entry.counts for entry in self.entries.values()), ShardCounts())


def read_ledger(root: Path) -> Ledger:
    """Read all documents of a folder."""
    complete, manifest, manifest_faults = _read_manifest(root)
    entries, entry_faults = _read_entries(root)
    if manifest is not None:
        entry_faults = _drop_strangers(entries, entry_faults, num_shards=manifest.num_shards)
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
    if not (root / DONE_FOLDER).is_dir():
        return []
    names = [f"{DONE_FOLDER}/{path.name}" for path in (root / DONE_FOLDER).iterdir()]
    numbered = [(int(match[1]), name) for name in names if (match := _STEM.fullmatch(Path(name).name))]
    return sorted(index for index, name in numbered if name == done_name(index))


def _drop_strangers(entries: dict[int, DoneEntry], faults: list[Fault], *, num_shards: int) -> list[Fault]:
    """Forget the entries of shards that the manifest does not know: files like any other that belong to nothing."""
    what = f"is of no shard: there are {num_shards}"
    beyond = {index for index in entries if index >= num_shards}
    for index in beyond:
        del entries[index]
    beyond |= {fault.shard for fault in faults if fault.shard is not None and fault.shard >= num_shards}
    strangers = [Fault(file=done_name(index), shard=index, what=what, cure="remove") for index in sorted(beyond)]
    return [fault for fault in faults if fault.shard not in beyond] + strangers


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
    """Hold the manifest against what it was written for."""
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

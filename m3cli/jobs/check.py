"""`m3 check`: read a folder, list all faults, and remove damaged files with --repair.

    ledger, strays    documents of the folder, files that no done entry names
    files             a thread hashes the files of the next shard
    contents          this thread checks shards whose files have the right hashes
    sample            encode some rows again (--sample), which needs the model
    repair            with the folder's lock; a check alone takes no lock

The exit code describes the folder after the check: 12 damage, 75 work remains, 3 rows were skipped, 0 complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3cli.concurrency import prefetch
from m3cli.config import RunConfig
from m3cli.errors import (
    EXIT_DONE,
    EXIT_ROWS_SKIPPED,
    DamageFound,
    OutputError,
    Stopped,
    UsageError,
    check_reachable,
)
from m3cli.jobs.encode.resolve import make_form
from m3cli.progress import FileMeter
from m3cli.records import DoneEntry
from m3cli.requests import CheckRequest
from m3cli.store.documents import find_links, is_ours
from m3cli.store.layout import RUN_NAME, shard_of
from m3cli.store.lock import hold_lock
from m3cli.store.verify.contents import Expected, check_contents
from m3cli.store.verify.ledger import (
    Fault,
    Ledger,
    check_files,
    find_strays,
    find_unknown,
    read_ledger,
    repair,
    shards_to_redo,
)
from m3cli.store.verify.rows import DuplicateIds, find_duplicate_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCheck:
    """Result of `m3 check`."""

    folder: str
    complete: bool
    "every shard is done, and nothing is damaged"
    num_shards: int
    "number of done shards"
    documents: int
    rows: int
    skipped: int
    bytes: int
    "of all files that done entries name"
    faults: tuple[Fault, ...]
    redo: tuple[int, ...]
    "shards to encode again"
    duplicate_ids: DuplicateIds
    sampled: int
    "rows that were encoded again and compared"
    unknown: tuple[str, ...]
    "other files and folders in folders of m3: not damage, and --repair does not remove them"
    removed: tuple[str, ...]
    "files that --repair removed"
    exit_code: int


def check_folder(request: CheckRequest, *, meter: FileMeter) -> FolderCheck:
    """Check a folder, and repair it with `request.repair`."""
    root = Path(request.folder).absolute()
    check_reachable(root / "_m3", OutputError)
    if not root.is_dir():
        raise UsageError(f"{request.folder}: no such folder")
    if not is_ours(root):
        raise UsageError(f"{request.folder} is not an m3 folder: it has no _m3/run.json")
    if request.repair and any(shard_of(name) is None for name in find_links(root)):
        request = replace(request, repair=False)  # a lock would be written through a link
    with hold_lock(root, worker=0, num_workers=1) if request.repair else nullcontext():
        return _check(root, request, meter=meter)


def _check(root: Path, request: CheckRequest, *, meter: FileMeter) -> FolderCheck:
    ledger = read_ledger(root)
    faults = [*ledger.faults, *find_strays(root, ledger)]
    run = ledger.run
    found, hashes = _check_shards(root, ledger, run, meter=meter)
    faults += found
    sampled = 0
    if request.sample:
        from m3cli.jobs.sample import sample_rows  # noqa: PLC0415  torch

        if run is None:
            raise DamageFound(f"{root / RUN_NAME} is missing or damaged: --sample needs it")
        undamaged = {index: entry for index, entry in ledger.entries.items() if index not in shards_to_redo(faults)}
        sampled, found = sample_rows(root, run, undamaged, request)
        faults += found
    duplicate_ids = find_duplicate_ids(root, hashes)
    removed = tuple(repair(root, faults)) if request.repair else ()
    counts = ledger.counts
    return FolderCheck(
        folder=request.folder,
        complete=ledger.manifest is not None and not faults,
        num_shards=len(ledger.entries),
        documents=counts.documents,
        rows=counts.chunks,
        skipped=counts.skipped,
        bytes=_count_bytes(ledger),
        faults=tuple(faults),
        redo=tuple(shards_to_redo(faults)),
        duplicate_ids=duplicate_ids,
        sampled=sampled,
        unknown=tuple(name for name in find_unknown(root) if name not in {fault.file for fault in faults}),
        removed=removed,
        exit_code=_choose_exit_code(ledger, faults, repaired=request.repair),
    )


def _check_shards(
    root: Path, ledger: Ledger, run: RunConfig | None, *, meter: FileMeter
) -> tuple[list[Fault], dict[int, NDArray[np.int64]]]:
    """Check every shard; return the faults, and the hashed ids of shards without faults."""
    expected = _make_expected(run) if run else None
    faults: list[Fault] = []
    hashes: dict[int, NDArray[np.int64]] = {}
    meter.start(_count_bytes(ledger))
    shards = prefetch(_hash_shards(root, ledger), depth=1, name="hashing")
    try:
        for entry, damaged in shards:
            faults += damaged
            if not damaged and expected is not None:
                check = check_contents(root, entry, expected)
                faults += check.faults
                if not check.faults:
                    hashes[entry.shard.index] = np.concatenate([np.empty(0, np.int64), *check.id_hashes])
            meter.advance(sum(record.length for record in entry.files))
    finally:
        shards.close()
        meter.stop()
    return faults, hashes


def _hash_shards(root: Path, ledger: Ledger) -> Iterator[tuple[DoneEntry, list[Fault]]]:
    for index in sorted(ledger.entries):
        yield ledger.entries[index], check_files(root, ledger.entries[index])


def _make_expected(run: RunConfig) -> Expected:
    config = run.config
    merged = config.long_docs == "merge"
    return Expected(
        form=make_form(run, kept=False), kept=config.fields.kept, max_length=config.max_length, merged=merged
    )


def _count_bytes(ledger: Ledger) -> int:
    return sum(record.length for entry in ledger.entries.values() for record in entry.files)


def _choose_exit_code(ledger: Ledger, faults: list[Fault], *, repaired: bool) -> int:
    remaining = [fault for fault in faults if fault.cure == "none"] if repaired else faults
    if remaining:
        return DamageFound.exit_code
    removed = any(fault.cure in ("redo", "manifest") for fault in faults)
    if ledger.manifest is None or removed:
        return Stopped.exit_code
    return EXIT_ROWS_SKIPPED if ledger.counts.skipped else EXIT_DONE

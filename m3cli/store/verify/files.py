"""The files that done entries name: there, of their length and of their hash. Nothing in them is read as anything."""

from __future__ import annotations

import stat
from pathlib import Path

from m3cli.errors import DamageFound
from m3cli.records import DoneEntry, FileRecord
from m3cli.store.sealed import hash_file, read_errors
from m3cli.store.verify.faults import Fault

IS_LINK = "is a symbolic link, which m3 does not make"


def check_files(root: Path, entry: DoneEntry) -> list[Fault]:
    """Hash the files of a shard."""
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

"""The folder's own documents: how run.json, done entries and the manifest are spelt, and how they are read back.

A done entry, `_m3/done/shard-0000000.json`:

    format_version  1
    shard           index, source, start, stop, row_group: as planned
    source          name of the source that `shard.source` counts to
    input_hash      xxh3_128 of the shard's input as it was read
    counts          documents, chunks, tokens, skipped, truncated, missing_ids
    files           name, length, xxh3_128 of each file of the shard, in the order they were published
    checksum        xxh3_128 of the document without it

The manifest, `_m3/manifest.json`: format_version, num_shards, counts (totals), length (bytes of all shards' files),
run (xxh3_128 of run.json), done (xxh3_128 of each done entry, in shard order), checksum. run.json is the job's own,
between format_version and checksum.

Reading takes no lock: each document was published whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m3cli.errors import DamageFound, ForeignFolder
from m3cli.records import DoneEntry, FileRecord, Shard, ShardCounts
from m3cli.store.layout import (
    DONE_FOLDER,
    FORMAT_VERSION,
    LOCK_NAME,
    MANIFEST_NAME,
    META,
    RUN_NAME,
    SHARD_FOLDERS,
    TMP_FOLDER,
    done_name,
    is_meta_name,
    shard_of,
)
from m3cli.store.sealed import hash_file, read_json


def check_version(document: Mapping[str, Any], *, name: str) -> None:
    """Refuse a document of another format version."""
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ForeignFolder(
            f"{name} has format version {version}, this m3 knows {FORMAT_VERSION}: use the m3cli that wrote the folder"
        )


def entry_document(entry: DoneEntry) -> dict[str, Any]:
    """Spell a done entry out."""
    return {"format_version": FORMAT_VERSION, **asdict(entry)}


def parse_entry(document: Mapping[str, Any], *, name: str) -> DoneEntry:
    """Read a done entry; another document raises DamageFound."""
    check_version(document, name=name)
    try:
        return DoneEntry(
            shard=Shard(**document["shard"]),
            source=document["source"],
            input_hash=document["input_hash"],
            counts=ShardCounts(**document["counts"]),
            files=tuple(FileRecord(**record) for record in document["files"]),
        )
    except (KeyError, TypeError) as error:
        raise DamageFound(f"{name} is not a done entry") from error


def manifest_document(entries: Iterable[DoneEntry], *, run_hash: str, done_hashes: list[str]) -> dict[str, Any]:
    """Sum a whole folder up."""
    counts, length = ShardCounts(), 0
    for entry in entries:
        counts += entry.counts
        length += sum(record.length for record in entry.files)
    return {
        "format_version": FORMAT_VERSION,
        "num_shards": len(done_hashes),
        "counts": asdict(counts),
        "length": length,
        "run": run_hash,
        "done": done_hashes,
    }


def read_run(root: Path) -> dict[str, Any] | None:
    """Read run.json as it was given to `write_run`, None if there is none; damage raises DamageFound."""
    if not (root / RUN_NAME).exists():
        return None
    document = read_json(root / RUN_NAME)
    check_version(document, name=RUN_NAME)
    del document["format_version"]
    return document


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Read the manifest, None if there is none; damage, or a run.json it does not mean, raises DamageFound."""
    if not (root / MANIFEST_NAME).exists():
        return None
    document = read_json(root / MANIFEST_NAME)
    check_version(document, name=MANIFEST_NAME)
    if document["run"] != hash_file(root / RUN_NAME)[1]:
        raise DamageFound(f"{root / RUN_NAME} is not the one that {MANIFEST_NAME} was written for")
    return document


def read_entries(root: Path) -> tuple[dict[int, DoneEntry], list[str]]:
    """Read all done entries by shard number, and name each one that cannot be believed."""
    entries: dict[int, DoneEntry] = {}
    faults: list[str] = []
    folder = root / DONE_FOLDER
    for path in (folder / name for name in _list_names(folder)):
        if shard_of(f"{DONE_FOLDER}/{path.name}") is None:
            continue  # a file of somebody else, which check lists
        try:
            entry = parse_entry(read_json(path), name=path.name)
        except DamageFound as damage:
            faults.append(str(damage))
            continue
        if root / done_name(entry.shard.index) == path:
            entries[entry.shard.index] = entry
        else:
            faults.append(f"{path} is the entry of shard {entry.shard.index}")
    return entries, faults


def is_ours(root: Path) -> bool:
    """Whether a run has been in the folder: it carries `_m3` with a lock or a run.json, or died creating `_m3`."""
    meta = root / META
    if not meta.is_dir():
        return False
    return (root / LOCK_NAME).exists() or (root / RUN_NAME).exists() or list(root.iterdir()) == [meta]


def find_links(root: Path) -> Iterator[str]:
    """Name the symbolic links that have the names of a run's files and folders: m3 makes none.

    Whoever made the folder may have let them point anywhere, so nothing is written or deleted through them.
    """
    for folder in (META, TMP_FOLDER, *SHARD_FOLDERS):
        if (root / folder).is_symlink():
            yield folder
        for name in _list_names(root / folder, links=True):
            if is_meta_name(f"{folder}/{name}") or shard_of(f"{folder}/{name}") is not None:
                yield f"{folder}/{name}"


def _list_names(folder: Path, *, links: bool = False) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as listing:
        return sorted(item.name for item in listing if not links or item.is_symlink())

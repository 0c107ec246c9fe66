"""The folder's own documents: the members of run.json, done entries and the manifest, and how they are read back.

A done entry, `_m3/done/shard-0000000.json`:

    format_version  1
    shard           index, source, start, stop, row_group: as planned
    source          name of the source that `shard.source` counts to
    input_hash      xxh3_128 of the shard's input as it was read
    counts          documents, chunks, tokens, skipped, truncated, missing_ids
    files           name, length, xxh3_128 of each file of the shard, in the order they were published
    checksum        xxh3_128 of the document without it

The manifest, `_m3/manifest.json`: format_version, num_shards, counts (totals), length (bytes of all shards' files),
run (xxh3_128 of run.json), done (xxh3_128 of each done entry, in shard order), checksum.

run.json: format_version, m3cli_version, fingerprint, then the members of `config.RunConfig`, checksum.

Each is parsed once, into a record that checks its members; whoever has the record need not check them again.

Reading takes no lock: each document was published whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import m3cli
from m3cli.config import RunConfig
from m3cli.errors import DamageFound, ForeignFolder
from m3cli.records import DoneEntry, Manifest, ShardCounts
from m3cli.store.layout import (
    DATA_NAMES,
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
    rows_name,
    shard_of,
)
from m3cli.store.sealed import hash_file, read_json
from m3cli.store.typed import parse_record


def run_document(run: RunConfig) -> dict[str, Any]:
    """Return the content of run.json."""
    return {"format_version": FORMAT_VERSION, **run.to_json()}


def entry_document(entry: DoneEntry) -> dict[str, Any]:
    """Spell a done entry out."""
    return {"format_version": FORMAT_VERSION, **asdict(entry)}


def read_entry(path: Path) -> DoneEntry:
    """Read a done entry; damage raises DamageFound."""
    entry = parse_record(DoneEntry, _read_document(path), name=str(path))
    index = entry.shard.index
    names = [record.name for record in entry.files]
    strange = sorted(set(names) - {name(index) for name in DATA_NAMES})
    if strange or len(set(names)) != len(names) or rows_name(index) not in names:
        what = f"names {strange[0]!r}" if strange else f"names {rows_name(index)} not once, or another file twice"
        raise DamageFound(f"{path} {what}, which no entry of shard {index} does")
    return entry


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


def read_run(root: Path) -> RunConfig | None:
    """Read run.json, None if there is none; damage raises DamageFound.

    Raises:
        ForeignFolder: another version of m3cli wrote it, with other members.
    """
    path = root / RUN_NAME
    if not path.exists():
        return None
    document = _read_document(path)
    version, fingerprint = document.get("m3cli_version"), document.pop("fingerprint", None)
    try:
        run = parse_record(RunConfig, document, name=str(path))
        if fingerprint != run.fingerprint:
            raise DamageFound(f"{path} is not what m3 writes: fingerprint is not that of its members")
    except DamageFound as damage:
        if not isinstance(version, str) or version == m3cli.__version__:
            raise
        raise ForeignFolder(
            f"{path} was written by m3cli {version[:20]}, and {m3cli.__version__} cannot read it; "
            "go on with the version that began the folder, or use another --out"
        ) from damage
    return run


def read_manifest(root: Path) -> Manifest | None:
    """Read the manifest, None if there is none; damage, or a run.json it does not mean, raises DamageFound."""
    path = root / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = parse_manifest(path)
    if not (root / RUN_NAME).exists():
        raise DamageFound(f"{root / RUN_NAME} is missing")
    if manifest.run != hash_file(root / RUN_NAME)[1]:
        raise DamageFound(f"{root / RUN_NAME} is not the one that {MANIFEST_NAME} was written for")
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """Read a manifest by itself; damage raises DamageFound."""
    manifest = parse_record(Manifest, _read_document(path), name=str(path))
    if len(manifest.done) != manifest.num_shards:
        raise DamageFound(f"{path} counts {manifest.num_shards} shards and lists {len(manifest.done)}")
    return manifest


def _read_document(path: Path) -> dict[str, Any]:
    """Read a document of this format version, without the members that all documents have."""
    document = read_json(path)
    version = document.pop("format_version", None)
    if type(version) is not int:
        raise DamageFound(f"{path} is not what m3 writes: it has no format_version")
    if version != FORMAT_VERSION:
        raise ForeignFolder(
            f"{path} has format version {version}, this m3 knows {FORMAT_VERSION}: use the m3cli that wrote the folder"
        )
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
            entry = read_entry(path)
        except DamageFound as damage:
            faults.append(str(damage))
            continue
        if root / done_name(entry.shard.index) == path:
            entries[entry.shard.index] = entry
        else:
            faults.append(f"{path} is the entry of shard {entry.shard.index}")
    return entries, faults


def find_misplaced(entries: Mapping[int, DoneEntry], run: RunConfig) -> list[int]:
    """Return the shards whose entries count to a source that run.json does not have."""
    return [index for index, entry in entries.items() if entry.shard.source >= len(run.sources)]


def list_wrong_lengths(root: Path, entries: Iterable[DoneEntry]) -> Iterator[str]:
    """Name each file of some shards that is missing or not as long as it was; nothing is read."""
    for entry in entries:
        for record in entry.files:
            path = root / record.name
            try:
                length = path.stat().st_size
            except OSError as error:
                missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
                yield f"{path} is missing" if missing else f"{path} cannot be read: {error.strerror or error}"
                continue
            if length != record.length:
                yield f"{path} has {length:,} bytes where {record.length:,} were written"


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

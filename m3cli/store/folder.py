"""An output folder opened by a run: read what is done, write shards, commit them.

The folder is locked before anything is read. It must be new, empty or an output folder; any other raises an error
before a byte is written. After an exception nothing is published; files in `_m3/tmp` are deleted by this run or by the
next one.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq

from m3cli.config import RunConfig
from m3cli.errors import DamageFound, ForeignFolder, OutputError
from m3cli.records import Chunks, DoneEntry, Manifest, ShardText
from m3cli.store.commit import (
    commit_shard,
    make_folder,
    output_errors,
    publish_bytes,
    publish_json,
    remove,
    staged_path,
)
from m3cli.store.documents import (
    find_links,
    hash_file,
    is_ours,
    list_done,
    list_wrong_lengths,
    manifest_document,
    name_check,
    name_repair,
    read_entries,
    read_manifest,
    read_metrics,
    read_run,
    run_document,
)
from m3cli.store.layout import (
    MANIFEST_NAME,
    META,
    METRICS_NAME,
    RUN_NAME,
    TMP_FOLDER,
    WORKER_METRICS,
    RowForm,
    done_name,
    row_schema,
    rows_name,
    worker_name,
)
from m3cli.store.lock import RunLock, hold_if_idle, hold_lock
from m3cli.store.shard import ShardWriter

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"across file systems, of another user's file, too many of one file, on a file system without links"


class RunFolder:
    """A locked output folder."""

    def __init__(self, root: Path, *, lock: RunLock, staging: Path) -> None:
        self.path = root
        self.lock = lock
        self._staging = staging
        self._durable_folders: set[Path] = set()

    def run(self) -> RunConfig | None:
        """Read run.json; None if it has not been written."""
        return read_run_to_resume(self.path)

    def write_run(self, run: RunConfig) -> None:
        """Publish run.json. A worker does so inside `lock.initialising()`, if `run()` still returns None."""
        publish_json(run_document(run), self.path / RUN_NAME, staging=self._staging)

    def done(self) -> dict[int, DoneEntry]:
        """Read all done entries, by shard number."""
        return read_done_to_resume(self.path)

    def list_done(self) -> set[int]:
        """Return the numbers of the shards that are done, by the names of their entries."""
        return list_done(self.path)

    def check_lengths(self, entries: Iterable[DoneEntry]) -> None:
        """Raise OutputError if a file of finished shards is missing or has another length."""
        with damage_stops(self.path):
            for wrong in list_wrong_lengths(self.path, entries):
                raise DamageFound(f"{wrong}; {name_repair(self.path)}")

    def manifest(self) -> Manifest | None:
        """Read the manifest; None if work remains."""
        with damage_stops(self.path):
            return read_manifest(self.path)

    def open_shard(self, *, form: RowForm, text: ShardText, chunks: Chunks, source: str) -> ShardWriter:
        """Open a shard for writing."""
        return ShardWriter(self._staging, form=form, text=text, chunks=chunks, source=source)

    def link_files(self, entry: DoneEntry, root: Path, *, form: RowForm) -> bool:
        """Stage the files of a shard of another folder as hard links, for `commit`.

        Returns:
            False if the file system has no link for them, or their columns have other types.
        """
        if not pq.read_schema(root / rows_name(entry.shard.index)).equals(row_schema(form)):
            return False
        staged = [staged_path(self._staging, record.name) for record in entry.files]
        with output_errors(self._staging):
            try:
                for record, link in zip(entry.files, staged, strict=True):
                    remove(link)  # of an attempt that was not committed
                    link.hardlink_to(root / record.name)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                for link in staged:
                    remove(link)
                return False
        return True

    def commit(self, entry: DoneEntry) -> None:
        """Publish a finished shard: its data files, then its done entry."""
        for name in [*(record.name for record in entry.files), done_name(entry.shard.index)]:
            folder = (self.path / name).parent
            if folder not in self._durable_folders:
                make_folder(folder)
                self._durable_folders.add(folder)
        commit_shard(self.path, entry, staging=self._staging)

    def write_manifest(self, num_shards: int) -> bool:
        """Publish the manifest if every shard is done; return whether it is. Workers may call this at the same time.

        Raises:
            ForeignFolder: the input has fewer shards than are done.
        """
        done = self.list_done()
        if (last := max(done, default=-1)) >= num_shards:
            raise ForeignFolder(
                f"{self.path.name} has {last + 1:,} shards, the input now has {num_shards:,}: it is shorter than it "
                "was; give the same input again, or use another --out"
            )
        if len(done) < num_shards:
            return False  # of many workers, the last one reads the entries
        entries = self.done()
        self.check_lengths(entries.values())
        hashes = [hash_file(self.path / done_name(index))[1] for index in range(num_shards)]
        document = manifest_document(
            [entries[index] for index in range(num_shards)],
            run_hash=hash_file(self.path / RUN_NAME)[1],
            done_hashes=hashes,
        )
        publish_json(document, self.path / MANIFEST_NAME, staging=self._staging)
        return True

    def write_metrics(self, document: dict[str, Any]) -> None:
        """Replace the metrics of this run or worker, which have no checksum: its speed."""
        worker = self._staging.name
        self._write_metrics(METRICS_NAME if self.lock.exclusive else WORKER_METRICS.format(worker=worker), document)

    def add_up_metrics(self) -> None:
        """Write the sum of the workers' metrics, if there are workers."""
        if not self.lock.exclusive and (total := read_metrics(self.path)) is not None:
            self._write_metrics(METRICS_NAME, total)

    def _write_metrics(self, name: str, document: dict[str, Any]) -> None:
        content = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        publish_bytes(content, self.path / name, staging=self._staging)


@contextmanager
def open_run_folder(path: Path, *, worker: int = 0, num_workers: int = 1) -> Iterator[RunFolder]:
    """Create the folder if it is missing, lock it, and delete temporary files of earlier runs."""
    root = path.absolute()
    _check_ours(root)
    _check_links(root)
    if not (root / RUN_NAME).exists():
        _create(root)
    with hold_lock(root, worker=worker, num_workers=num_workers) as lock:
        tmp = root / TMP_FOLDER
        staging = tmp / worker_name(worker, num_workers)
        with output_errors(tmp):
            _clear(tmp if lock.exclusive else staging)
            for other in () if lock.exclusive else tmp.glob("*-of-*"):
                with hold_if_idle(root, other.name) as idle:
                    if idle:  # it died; it may not come again under this name
                        _clear(other)
            staging.mkdir(parents=True, exist_ok=True)
        try:
            yield RunFolder(root, lock=lock, staging=staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _check_links(root: Path) -> None:
    """Raise OutputError if a file or folder of m3 is a symbolic link."""
    with output_errors(root):
        found = next(find_links(root), None)
    if found is not None:
        raise OutputError(
            f"{root / found} is a symbolic link, which m3 does not make, and it writes through none; put a real file "
            "or folder there, or choose another --out"
        )


def _check_ours(root: Path) -> None:
    with output_errors(root):
        if not root.exists():
            return
        if not root.is_dir():
            raise OutputError(f"{root} is a file: choose another --out")
        if any(root.iterdir()) and not is_ours(root):
            raise ForeignFolder(f"{root} is not empty and not an m3 folder: choose another --out")


def _create(root: Path) -> None:
    """Create the folder and its missing parents; their names are durable before run.json is."""
    with output_errors(root):
        missing = [folder for folder in root.parents if not folder.exists()]
    for folder in (*reversed(missing), root, root / META):
        make_folder(folder)


def _clear(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def read_run_to_resume(root: Path) -> RunConfig | None:
    """Read run.json, None if there is none; raise OutputError if it is damaged."""
    with damage_stops(root):
        return read_run(root)


def read_done_to_resume(root: Path) -> dict[int, DoneEntry]:
    """Read all done entries; raise OutputError if one is damaged."""
    with damage_stops(root):
        entries, faults = read_entries(root)
        for fault in faults:
            raise DamageFound(fault)
        return entries


@contextmanager
def damage_stops(root: Path) -> Iterator[None]:
    """Turn DamageFound into the OutputError of a run that would write to the folder."""
    try:
        yield
    except DamageFound as damage:
        remedy = "" if name_check(root) in str(damage) else f"; {name_check(root)}"
        raise OutputError(f"{damage}{remedy}") from damage

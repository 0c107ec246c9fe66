"""An output folder opened by a run: read what is done, write shards, commit them.

The folder is locked before anything is read. It must be new, empty or an output folder; any other raises an error
before a byte is written. After an exception nothing is published; files in `_m3/tmp` are deleted by this run or by the
next one.

A shard is written into the worker's tmp folder, window by window. A window is a slice of consecutive rows. Rows are
known before the first window, and so is the number of vectors unless tokens are selected, pooled or merged. Every file
is written once from start to end, except the header of npy files of an unknown number of vectors. Memory is bounded by
a window and a row group. Equal rows and vectors give equal bytes, whatever the windows: no time, host or path is in a
file.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from m3cli.config import RunConfig
from m3cli.errors import DamageFound, ForeignFolder, OutputError
from m3cli.paths import exists, is_folder
from m3cli.records import Chunks, DoneEntry, Embeddings, Manifest, ShardCounts, ShardText, SkippedRow
from m3cli.store.commit import (
    StagedFile,
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
    colbert_name,
    dense_name,
    done_name,
    hashes_name,
    indptr_name,
    lexical_name,
    row_schema,
    rows_name,
    scales_name,
    skipped_name,
    worker_name,
)
from m3cli.store.lock import RunLock, hold_if_idle, hold_lock
from m3cli.store.npy import ColbertFiles, DenseFile, LexicalFile, write_hashes
from m3cli.store.parquet import RowsFile, build_rows

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
    if not exists(root / RUN_NAME):
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
        if not exists(root):
            return
        if not is_folder(root):
            raise OutputError(f"{root} is a file: choose another --out")
        if any(root.iterdir()) and not is_ours(root):
            raise ForeignFolder(f"{root} is not empty and not an m3 folder: choose another --out")


def _create(root: Path) -> None:
    """Create the folder and its missing parents; their names are durable before run.json is."""
    with output_errors(root):
        missing = [folder for folder in root.parents if not exists(folder)]
    for folder in (*reversed(missing), root, root / META):
        make_folder(folder)


def _clear(folder: Path) -> None:
    if is_folder(folder):
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


SKIPPED_ROW_BYTES = 64 << 10


class _Part(Protocol):
    def append(self, rows: pa.Table, embeddings: Embeddings) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...


class ShardWriter:
    """Open files of a shard; they are deleted unless `finish` is called."""

    def __init__(self, staging: Path, *, form: RowForm, text: ShardText, chunks: Chunks, source: str) -> None:
        self._staging = staging
        self._form = form
        self._text = text
        self._chunks = chunks
        self._source = source
        self._next_row = 0
        self._staged: list[StagedFile] = []
        self._parts: list[_Part] = []
        try:
            self._open_parts()
        except BaseException:
            self.discard()
            raise

    def _open_parts(self) -> None:
        form, index, rows = self._form, self._text.shard.index, self._chunks.num_rows
        self._parts.append(RowsFile(self._stage(rows_name(index)), form))
        if form.format != "npy":
            return
        if "dense" in form.outputs:
            staged = self._stage(dense_name(index))
            self._parts.append(DenseFile(staged, rows=rows, dim=form.dim, dtype=form.dense_dtype))
        if "sparse" in form.outputs:
            self._parts.append(LexicalFile(self._stage(lexical_name(index)), vocabulary=form.vocabulary))
        if "colbert" in form.outputs:
            vectors, indptr = self._stage(colbert_name(index)), self._stage(indptr_name(index))
            scales = self._stage(scales_name(index)) if form.scaled else None
            num_vectors = _count_vectors(self._chunks) if form.exact_vectors else None
            self._parts.append(ColbertFiles(vectors, indptr, scales, form=form, rows=rows, num_vectors=num_vectors))

    def _stage(self, name: str) -> StagedFile:
        staged = StagedFile(self._staging, name)
        self._staged.append(staged)
        return staged

    def append(self, embeddings: Embeddings) -> None:
        """Append a window: the embeddings of the next rows."""
        start, stop = self._next_row, self._next_row + len(embeddings.rows)
        if embeddings.rows.tolist() != list(range(start, stop)):
            raise ValueError(f"a window must start at row {start} and have consecutive rows")
        _check_outputs(self._form, embeddings)
        if start == stop:
            return
        rows = build_rows(self._form, text=self._text, chunks=self._chunks, start=start, stop=stop)
        for part in self._parts:
            part.append(rows, embeddings)
        self._next_row = stop

    def finish(self) -> DoneEntry:
        """Complete the files and make their bytes durable; return the entry for `RunFolder.commit`."""
        if self._next_row != self._chunks.num_rows:
            raise ValueError(f"{self._chunks.num_rows} rows were planned, {self._next_row} appended")
        for part in self._parts:
            part.finish()
        index, text, chunks = self._text.shard.index, self._text, self._chunks
        write_hashes(self._stage(hashes_name(index)), text.documents)
        if text.skipped:
            self._stage(skipped_name(index)).write(b"".join(map(_skipped_line, text.skipped)))
        entry = DoneEntry(
            shard=text.shard,
            source=self._source,
            input_hash=text.input_hash,
            counts=ShardCounts(
                documents=len(text.documents),
                chunks=chunks.num_rows,
                tokens=int(chunks.num_tokens[chunks.chunk_index >= 0].sum()),
                skipped=len(text.skipped),
                truncated=int(chunks.truncated.sum()),
                missing_ids=sum(not document.has_own_id for document in text.documents),
            ),
            files=tuple(staged.seal() for staged in self._staged),
        )
        self._staged, self._parts = [], []
        return entry

    def discard(self) -> None:
        """Close and delete the files; do nothing after `finish`."""
        for part in self._parts:
            part.discard()
        for staged in self._staged:
            staged.discard()
        self._staged, self._parts = [], []

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Discard the shard unless it is finished."""
        self.discard()


def _count_vectors(chunks: Chunks) -> int:
    """Return the number of ColBERT vectors: one per token except `<s>`, none for documents' own rows."""
    return int((chunks.num_tokens - 1)[chunks.chunk_index >= 0].sum())


def _check_outputs(form: RowForm, embeddings: Embeddings) -> None:
    values = {
        "dense": embeddings.dense_vecs,
        "sparse": embeddings.lexical_weights,
        "colbert": embeddings.colbert_vecs,
    }
    if {name for name, value in values.items() if value is not None} != set(form.outputs):
        raise ValueError(f"a window must carry exactly the outputs {', '.join(form.outputs)}")


def _skipped_line(skipped: SkippedRow) -> bytes:
    line: dict[str, Any] = {
        "source": skipped.source,
        "position": skipped.position,
        "byte_offset": skipped.byte_offset,
        "id": None if skipped.id is None else _printable(skipped.id),
        "reason": skipped.reason,
        "detail": _printable(skipped.detail),
        "row": skipped.row[:SKIPPED_ROW_BYTES].decode("utf-8", errors="backslashreplace"),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _printable(text: str) -> str:
    # A lone surrogate, which may be why the row is skipped, has no UTF-8 form.
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")

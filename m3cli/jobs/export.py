"""`m3 export`: a finished folder to files that load into a database, a part a shard.

    OUT/part-0000000.*      a shard's files, published together with their entry
    OUT/README.md ...       how they load and are searched; schema, mapping or collection file
    OUT/left-out.jsonl      rows and fields that the target cannot hold; only there if there are some
    OUT/export.json         written last: the export is complete
    OUT/_export/            what it was begun with, an entry for each part, the lock, staging

An export that died goes on with the parts that have no entry.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.concurrency import prefetch
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, DamageFound, ForeignFolder, OutputError, Stopped, UsageError
from m3cli.exporters.rows import (
    KEY_COLUMNS,
    PLAIN_COLUMNS,
    LeftOut,
    Part,
    Shape,
    Target,
    cut_part,
    drop_rows,
    find_target,
    hash_keys,
    make_part,
)
from m3cli.jobs.encode.estimate import check_disk_space
from m3cli.paths import exists, is_folder
from m3cli.progress import FileMeter
from m3cli.records import FileRecord, Output, is_among
from m3cli.requests import ExportRequest, TransferRequest
from m3cli.store.commit import (
    PIECE,
    StagedFile,
    make_folder,
    output_errors,
    publish_bytes,
    publish_file,
    publish_json,
    sync_file,
    sync_folder,
)
from m3cli.store.documents import hash_file, list_wrong_lengths, name_check, read_json
from m3cli.store.layout import MANIFEST_NAME, RESERVED_COLUMNS, TEXT_COLUMN
from m3cli.store.lock import hold_alone
from m3cli.store.reader import OutputFolder, describe, iter_parts, open_folder, read_shard

PART_BYTES = 64 << 20
"of vectors, texts and fields that are held together"
FORMAT_VERSION = 1
META = "_export"
BEGUN_NAME = "_export/begun.json"
EXPORT_NAME = "export.json"
LEFT_OUT_NAME = "left-out.jsonl"
ROWS_EXPANSION = 4
"how many times their bytes on disk rows without vectors take, about"

Repeats = dict[int, NDArray[np.int64]]
"by shard the rows whose key an earlier row has"
FindRepeats = Callable[[], Repeats]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What was written."""

    rows: int
    rows_left_out: int
    left_out: dict[str, int]
    "by what was done and why"
    parts: int
    bytes: int

    @property
    def exit_code(self) -> int:
        """3 where something was left out."""
        return EXIT_ROWS_SKIPPED if self.left_out else EXIT_DONE


def export_folder(request: ExportRequest, *, meter: FileMeter) -> ExportSummary:
    """Write a folder's rows for a target; see the module's docstring.

    Raises:
        UsageError: the target or the folder lacks what was asked for.
        Stopped: the folder is not finished.
        ForeignFolder: `out` was begun from another folder, or with other options.
        OutputError: the disk is too small.
    """
    target = find_target(request.to)
    folder = open_finished(request.folder)
    shape = make_shape(folder, request, target)
    with _open_out(Path(request.out).absolute()) as out:
        _begin(out, folder, request, shape)
        jobs: list[int | None] = [None] if target.whole else list(folder.entries)
        todo = [index for index in jobs if read_entry(out, index) is None]
        if todo or not exists(out / EXPORT_NAME):
            _check_space(out, folder, shape, target, request, done=len(jobs) - len(todo))
            _write_parts(out, folder, shape, target, todo=todo, meter=meter)
            return _finish(out, folder, shape, target, jobs, request)
        return _summarise([read_entry(out, index) for index in jobs])


def open_finished(path: str) -> OutputFolder:
    """Open a folder to be exported.

    Raises:
        Stopped: it is not finished.
        DamageFound: a file is missing, or has another length than it was written with.
    """
    folder = open_folder(Path(path))
    if folder.manifest is None:
        raise Stopped(f"{path} is not finished: {len(folder.entries):,} shards are done; run its m3 encode again first")
    if not folder.entries:
        raise UsageError(f"{path} has no rows; encode a corpus that has some")
    for wrong in list_wrong_lengths(folder.path, folder.entries.values()):
        raise DamageFound(f"{wrong}; {name_check(Path(path))}")
    return folder


def make_shape(folder: OutputFolder, request: TransferRequest, target: Target) -> Shape:
    """Find out what is exported.

    Raises:
        UsageError: the target or the folder lacks what was asked for.
    """
    run = folder.run
    config = run.config
    binary = config.colbert_dtype == "binary" and not target.binary
    able = [output for output in target.outputs if not (output == "colbert" and binary)]
    for output in request.outputs or ():
        if output not in config.outputs:
            raise UsageError(f"--outputs {output}: {request.folder} has only {','.join(config.outputs)}")
        if output not in able:
            what = "ColBERT vectors of a bit a number" if output in target.outputs else output
            raise UsageError(f"--outputs {output}: {request.to} cannot hold {what}; use --outputs {','.join(able)}")
    outputs = request.outputs or tuple(output for output in config.outputs if output in able)
    if not outputs:
        held = ",".join(target.outputs)
        raise UsageError(f"{request.folder} has only {','.join(config.outputs)}, and {request.to} holds {held}")
    rows = read_shard(folder, next(iter(folder.entries)), outputs=()).rows
    names = [name for name in rows.column_names if name not in RESERVED_COLUMNS or name == TEXT_COLUMN]
    for name in request.fields or ():
        if name not in names:
            held = f"only {', '.join(names)}" if names else "no kept fields"
            raise UsageError(f"--fields {name!r}: {request.folder} has {held}")
    chosen = [name for name in names if request.fields is None or name in request.fields]
    shape = Shape(
        name=request.name or _make_name(request.folder),
        outputs=outputs,
        dim=run.checkpoint.dim,
        vocabulary=run.checkpoint.vocabulary,
        columns=rows.select([*PLAIN_COLUMNS, *chosen]).schema,
        dense_dtype=config.dense_dtype,
        colbert_dtype=config.colbert_dtype,
        rows=folder.counts.chunks,
    )
    if target.check is not None:
        target.check(shape)
    return shape


def _make_name(folder: str) -> str:
    """Make a name that every engine takes of a folder's: small letters, digits and underscores."""
    name = re.sub(r"[^a-z0-9]+", "_", Path(folder).resolve().stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"m3_{name}".rstrip("_")


def read_parts(
    folder: OutputFolder,
    shards: Sequence[int],
    *,
    outputs: Sequence[Output],
    columns: Sequence[str],
    part_bytes: float = PART_BYTES,
) -> Iterator[Part | None]:
    """Read shards part by part, and None after the last part of each. The one place where exports read a folder."""
    wanted = list(dict.fromkeys((*KEY_COLUMNS, *columns)))
    for index in shards:
        only = replace(folder, entries={index: folder.entries[index]})
        for piece in iter_parts(only, outputs=outputs, columns=wanted):
            part = make_part(index, piece.rows, piece.embeddings, columns=columns)
            yield from cut_part(part, part_bytes)
        yield None


def find_repeats(folder: OutputFolder) -> Repeats:
    """Find the rows whose key an earlier row has, by 64-bit hashes: 8 bytes a row are held."""
    hashes, end = np.empty(folder.counts.chunks, np.uint64), 0
    for piece in iter_parts(folder, outputs=(), columns=KEY_COLUMNS):
        start, end = end, end + len(piece.embeddings.rows)
        hashes[start:end] = hash_keys(piece.rows)
    hashes.sort()
    several = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del hashes
    if not len(several):
        return {}
    seen: set[int] = set()
    repeats: dict[int, list[int]] = {}
    for piece in iter_parts(folder, outputs=(), columns=KEY_COLUMNS):
        found = hash_keys(piece.rows)
        for place in np.flatnonzero(is_among(found, several)).tolist():
            if (key := int(found[place])) in seen:
                repeats.setdefault(piece.shard, []).append(int(piece.embeddings.rows[place]))
            seen.add(key)
    return {shard: np.array(rows, np.int64) for shard, rows in repeats.items()}


def drop_repeats(part: Part, repeats: Repeats, lost: LeftOut | None) -> Part:
    """Return a part without the rows whose key an earlier row has."""
    dropped = np.flatnonzero(np.isin(part.embeddings.rows, repeats.get(part.shard, ())))
    return drop_rows(part, dropped, lost, "an earlier row has this key")


def _keep_first(part: Part, repeats: Repeats, lost: LeftOut | None) -> Iterator[Part]:
    """Yield a part without repeats, unless nothing is left: no target has to take an empty part."""
    kept = drop_repeats(part, repeats, lost)
    if kept.num_rows:
        yield kept


@contextmanager
def _open_out(out: Path) -> Iterator[Path]:
    """Create the folder of an export, lock it, and clear what a dead one left in staging."""
    with output_errors(out):
        if exists(out) and not is_folder(out):
            raise OutputError(f"{out} is a file: choose another --out")
        if exists(out) and any(out.iterdir()) and not is_folder(out / META):
            raise ForeignFolder(f"{out} is not empty and not an export: choose another --out")
        missing = [folder for folder in out.parents if not exists(folder)]
    for folder in (*reversed(missing), out, out / META):
        make_folder(folder)
    with hold_alone(out, out / META / "lock"):
        staging = _staging(out)
        with output_errors(staging):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        try:
            yield out
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _staging(out: Path) -> Path:
    return out / META / "tmp"


def _begin(out: Path, folder: OutputFolder, request: ExportRequest, shape: Shape) -> None:
    """Write down what an export is of, or compare with what is written.

    Raises:
        ForeignFolder: it was begun from another folder, or with other options.
    """
    now = _identify(folder, request, shape)
    if not exists(out / BEGUN_NAME):
        publish_json(now, out / BEGUN_NAME, staging=_staging(out))
        return
    before = read_json(out / BEGUN_NAME)
    for name, value in now.items():
        if before.get(name) != value:
            what = "another folder" if name == "manifest" else f"--{name} {_show(before.get(name))}"
            asked = request.folder if name == "manifest" else _show(value)
            raise ForeignFolder(
                f"{request.out} was begun with {what}, this export asks for {asked}; use the same, or another --out"
            )


def _identify(folder: OutputFolder, request: ExportRequest, shape: Shape) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "to": request.to,
        "manifest": hash_file(folder.path / MANIFEST_NAME)[1],
        "outputs": list(shape.outputs),
        "fields": [field.name for field in shape.kept],
        "name": shape.name,
    }


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _stem(index: int | None) -> str:
    return "folder" if index is None else f"part-{index:07d}"


def read_entry(out: Path, index: int | None) -> dict[str, Any] | None:
    """Read the entry of a part; None: it is not written, or a file of it is missing or has another length."""
    path = out / META / f"{_stem(index)}.json"
    if not exists(path):
        return None
    with suppress(DamageFound):
        entry = read_json(path)
        files = [out / file["name"] for file in entry["files"]]
        lengths = [file["length"] for file in entry["files"]]
        if [path.stat().st_size if exists(path) else None for path in files] == lengths:
            return entry
    return None


def _check_space(
    out: Path, folder: OutputFolder, shape: Shape, target: Target, request: ExportRequest, *, done: int
) -> None:
    if request.space_check:
        parts = list(folder.entries.items())
        sizes = estimate_sizes(folder, shape, target)
        check_disk_space(out, sizes, num_shards=len(parts), done=dict(parts[:done]))


def estimate_sizes(folder: OutputFolder, shape: Shape, target: Target) -> dict[str, int]:
    """Estimate the bytes of an export by what the folder takes, on the high side."""
    stored = describe(folder).bytes
    numbers = {
        "dense": shape.rows * shape.dim,
        "colbert": stored.get("colbert", 0) * (8 if shape.colbert_dtype == "binary" else 1),
    }
    if shape.colbert_dtype == "float16":
        numbers["colbert"] //= 2
    sizes = {"rows": stored["rows"] * ROWS_EXPANSION}
    for output in shape.outputs:
        if output == "sparse":
            sizes[output] = int(stored[output] / 8 * target.weight_bytes)
        else:
            sizes[output] = int(numbers[output] * target.number_bytes)
    return sizes


def _write_parts(
    out: Path, folder: OutputFolder, shape: Shape, target: Target, *, todo: Sequence[int | None], meter: FileMeter
) -> None:
    repeats = find_repeats(folder)
    shape = replace(shape, rows=shape.rows - sum(map(len, repeats.values())))
    shards = [index for index in folder.entries if index in todo or target.whole]
    meter.start(sum(file.length for index in shards for file in folder.entries[index].files))
    try:
        if target.whole:
            with _PartWriter(out, None) as writer:
                writer.write(target, shape, _Reader(folder, shards, shape, repeats, writer, meter))
            return
        columns = shape.columns.names
        stream = prefetch(
            read_parts(folder, shards, outputs=shape.outputs, columns=columns), depth=1, name="reading rows"
        )
        with ExitStack() as stack:
            stack.callback(stream.close)
            for index in shards:
                with _PartWriter(out, index) as writer:
                    writer.write(target, shape, _Stream(stream, repeats, writer))
                meter.advance(sum(file.length for file in folder.entries[index].files))
    finally:
        meter.stop()


class _Stream:
    """The parts of one shard, out of those of all that are read ahead."""

    def __init__(self, stream: Iterator[Part | None], repeats: Repeats, writer: _PartWriter) -> None:
        self._stream, self._repeats, self._writer = stream, repeats, writer

    def __call__(self, outputs: Sequence[Output] | None) -> Iterator[Part]:
        assert outputs is None, "a shard is read once"
        for part in self._stream:
            if part is None:
                return
            self._writer.count(part)
            yield from _keep_first(part, self._repeats, self._writer.lost)


class _Reader:
    """The parts of all shards, as often as they are asked for; what is left out is noted the first time."""

    def __init__(
        self,
        folder: OutputFolder,
        shards: Sequence[int],
        shape: Shape,
        repeats: Repeats,
        writer: _PartWriter,
        meter: FileMeter,
    ) -> None:
        self._folder, self._shards, self._shape = folder, shards, shape
        self._repeats, self._writer, self._meter = repeats, writer, meter
        self._read = False

    def __call__(self, outputs: Sequence[Output] | None) -> Iterator[Part]:
        again, self._read = self._read, True
        parts = read_parts(
            self._folder,
            self._shards,
            outputs=self._shape.outputs if outputs is None else outputs,
            columns=PLAIN_COLUMNS if again else self._shape.columns.names,
        )
        stream = prefetch(parts, depth=1, name="reading rows")
        done = iter(self._shards)
        with ExitStack() as stack:
            stack.callback(stream.close)
            for part in stream:
                if part is None:
                    self._meter.advance(0 if again else self._size(next(done)))
                    continue
                if not again:
                    self._writer.count(part)
                yield from _keep_first(part, self._repeats, None if again else self._writer.lost)

    def _size(self, index: int) -> int:
        return sum(file.length for file in self._folder.entries[index].files)


class _PartWriter:
    """A part's files while they are written. Left by an exception, they are given up."""

    def __init__(self, out: Path, index: int | None) -> None:
        self._out, self._index = out, index
        self._files: list[StagedFile] = []
        self._list = StagedFile(_staging(out), f"{META}/{_stem(index)}.{LEFT_OUT_NAME}")
        self._rows = self._longest = 0
        self.lost = LeftOut(self._list.write)

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._files, self._list):
            if not file.closed:
                file.discard()

    def count(self, part: Part) -> None:
        """Count rows that are handed to the target."""
        self._rows += part.num_rows
        if part.embeddings.colbert_vecs is not None and part.num_rows:
            self._longest = max(self._longest, int(np.diff(part.embeddings.colbert_vecs.indptr).max()))

    def open_file(self, ending: str) -> StagedFile:
        """Open one of the part's files."""
        name = ending if self._index is None else f"{_stem(self._index)}{ending}"
        self._files.append(StagedFile(_staging(self._out), name))
        return self._files[-1]

    def _write_folder(self, target: Target, shape: Shape, read: Any) -> list[FileRecord]:
        """Publish a folder whose files a client writes and names; one without an entry is written again."""
        name = f"{shape.name}{target.folder_ending}"
        staged, final = _staging(self._out) / name, self._out / name
        assert target.write_folder is not None
        with output_errors(final):
            target.write_folder(read, staged, shape, self.lost)
            for path in sorted(staged.rglob("*"), reverse=True):
                if is_folder(path):
                    sync_folder(path)
                else:
                    with path.open("rb") as file:
                        sync_file(file.fileno())
            sync_folder(staged)
            shutil.rmtree(final, ignore_errors=True)
        publish_file(staged, final)
        files = sorted(path for path in final.rglob("*") if path.is_file())
        hashes = [(path, *hash_file(path)) for path in files]
        return [
            FileRecord(name=path.relative_to(self._out).as_posix(), length=length, xxh3_128=digest)
            for path, length, digest in hashes
        ]

    def write(self, target: Target, shape: Shape, read: Any) -> None:
        """Write the part and publish it, its entry last."""
        if target.write_folder is not None:
            records = self._write_folder(target, shape, read)
        else:
            assert target.write is not None
            target.write(read, self.open_file, shape, self.lost)
            records = [file.seal() for file in self._files]
            for record, file in zip(records, self._files, strict=True):
                publish_file(file.path, self._out / record.name)
        listed = self._list.seal()
        if listed.length:
            publish_file(self._list.path, self._out / listed.name)
        entry = {
            "rows": self._rows - self.lost.rows,
            "rows_left_out": self.lost.rows,
            "left_out": dict(sorted(self.lost.reasons.items())),
            "longest": self._longest,
            "files": [{"name": each.name, "length": each.length, "xxh3_128": each.xxh3_128} for each in records],
        }
        publish_json(entry, self._out / META / f"{_stem(self._index)}.json", staging=_staging(self._out))


def _finish(
    out: Path, folder: OutputFolder, shape: Shape, target: Target, jobs: Sequence[int | None], request: ExportRequest
) -> ExportSummary:
    """Write what makes the parts load, the list of what is left out, and export.json."""
    entries = [entry for index in jobs if (entry := read_entry(out, index)) is not None]
    longest = max((entry["longest"] for entry in entries), default=0)
    for name, content in target.describe(replace(shape, longest=longest)).items():
        publish_bytes(content, out / name, staging=_staging(out))
    lists = [path for index in jobs if exists(path := out / META / f"{_stem(index)}.{LEFT_OUT_NAME}")]
    if lists:
        _join_lists(out, lists)
    summary = _summarise(entries)
    document = {
        **_identify(folder, request, shape),
        "rows": summary.rows,
        "rows_left_out": summary.rows_left_out,
        "left_out": summary.left_out,
        "parts": [file for entry in entries for file in entry["files"]],
    }
    publish_json(document, out / EXPORT_NAME, staging=_staging(out))
    return summary


def _join_lists(out: Path, lists: Sequence[Path]) -> None:
    joined = StagedFile(_staging(out), LEFT_OUT_NAME)
    try:
        for path in lists:
            with path.open("rb") as file:
                while piece := file.read(PIECE):
                    joined.write(piece)
        joined.seal()
        publish_file(joined.path, out / LEFT_OUT_NAME)
    finally:
        joined.close()


def _summarise(entries: Sequence[dict[str, Any] | None]) -> ExportSummary:
    known = [entry for entry in entries if entry is not None]
    reasons: Counter[str] = Counter()
    for entry in known:
        reasons.update(entry["left_out"])
    return ExportSummary(
        rows=sum(entry["rows"] for entry in known),
        rows_left_out=sum(entry["rows_left_out"] for entry in known),
        left_out=dict(sorted(reasons.items())),
        parts=len(known),
        bytes=sum(file["length"] for entry in known for file in entry["files"]),
    )

"""`m3 load`: the rows of a finished folder into a running engine, or tonight's changes.

    parts (read ahead) -> rows without repeated keys, and with --since the changed ones -> batches -> upsert by key

Loading again changes nothing. A batch that fails for a reason that passes is sent again; any other error ends the load
with the engine's own words.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from m3cli.concurrency import prefetch
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, M3Error, OutputError
from m3cli.exporters.rows import (
    KEY_COLUMNS,
    PLAIN_COLUMNS,
    LeftOut,
    Part,
    Shape,
    cut_part,
    find_engine,
    hash_keys,
    list_keys,
    list_values,
    pick,
)
from m3cli.jobs.encode.increment import MAY_DIFFER
from m3cli.jobs.encode.lifecycle import Stop
from m3cli.jobs.export import Repeats, drop_repeats, find_repeats, make_shape, open_finished, read_parts
from m3cli.progress import FileMeter
from m3cli.records import is_among
from m3cli.requests import LoadRequest
from m3cli.store.commit import publish_outside
from m3cli.store.layout import TEXT_COLUMN, hashes_name
from m3cli.store.reader import OutputFolder, iter_parts

RETRIES = 6
FIRST_PAUSE = 0.5
"seconds; each pause is twice as long as the one before"
KEYS_PER_DELETE = 500
_SECRETS = re.compile(r"://[^/@:]*:([^@\s]+)@|(?:password|token|api_key)=('[^']*'|[^\s&]+)", re.IGNORECASE)

T = TypeVar("T")


class Engine(Protocol):
    """A collection, table or index in a running engine, open."""

    batch_bytes: int
    "most that is sent at once"
    number_bytes: float
    "that a dense or ColBERT number takes when it is sent, at most"
    weight_bytes: float

    def create(self) -> bool:
        """Create the collection, or check that an existing one has this schema; say whether it is new.

        Raises:
            ForeignFolder: it has another schema.
        """

    def make_batch(self, part: Part, lost: LeftOut) -> Any:
        """Make what is sent for some rows; what the engine cannot hold is left out."""

    def upsert(self, batch: Any) -> None:
        """Write rows, in place of those with their keys."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete the rows of these keys that are there."""

    def finish(self) -> None:
        """Do what comes after all rows: indexes, flushing."""

    def count(self) -> int:
        """Count all rows."""

    def close(self) -> None:
        """Close the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSummary:
    """What was sent."""

    name: str
    rows: int
    deleted: int
    unchanged: int
    missing: int
    "rows that the engine had less than the folder of `--since`, which was not loaded whole or lost rows since"
    others: int
    "rows of another load in the collection that this load has made"
    rows_left_out: int
    left_out: dict[str, int]
    "by what was done and why"

    @property
    def exit_code(self) -> int:
        """3 where something was left out."""
        return EXIT_ROWS_SKIPPED if self.left_out else EXIT_DONE


def load_folder(
    request: LoadRequest, *, since: str | None, left_out: Path, meter: FileMeter, stop: Stop
) -> LoadSummary:
    """Send a folder's rows to an engine.

    Raises:
        UsageError: the engine or the folder lacks what was asked for.
        Stopped: the folder is not finished.
        ForeignFolder: the collection has another schema.
        OutputError: the engine refuses, or does not answer.
    """
    name, address, module = find_engine(request.to)
    folder = open_finished(request.folder)
    shape = make_shape(folder, request, module.find_limits(address))
    repeats = find_repeats(folder)
    with ExitStack() as stack:
        call = _Caller(module.explain, shown=f"{name}:{hide_secrets(address)}", address=address, stop=stop)
        engine: Engine = call(lambda: module.connect(address, shape))
        stack.callback(engine.close)
        created, changes, missing = call(engine.create), None, 0
        if since is not None and not created and (held := call(engine.count)):
            changes = find_changes(open_finished(since), folder, [field.name for field in shape.kept])
            missing = max(0, changes.old_count - held)
        pending = stack.enter_context(_PendingList(left_out))
        lost = LeftOut(pending.write)
        rows = _send(folder, shape, engine, repeats, changes, lost, call=call, meter=meter)
        deleted = 0 if changes is None else _delete(engine, changes, call)
        call(engine.finish)
        found = call(engine.count) if created else rows
        if found < rows:
            raise OutputError(
                f"{call.shown}: {shape.name} has {found:,} rows, expected {rows:,}; remove it and load again"
            )
    return LoadSummary(
        name=shape.name,
        rows=rows,
        deleted=deleted,
        unchanged=0 if changes is None else changes.count,
        missing=missing,
        others=found - rows,
        rows_left_out=lost.rows,
        left_out=dict(sorted(lost.reasons.items())),
    )


def hide_secrets(text: str) -> str:
    """Return an address without its passwords and keys."""
    return _SECRETS.sub(lambda found: found[0].replace(found[1] or found[2], "***"), text)


class _Caller:
    """Calls an engine, again where an error passes; its other errors become an OutputError with its own words."""

    def __init__(
        self, explain: Callable[[Exception], tuple[bool, str] | None], *, shown: str, address: str, stop: Stop
    ) -> None:
        self.shown = shown
        self._explain, self._stop = explain, stop
        self._secrets = [found[1] or found[2] for found in _SECRETS.finditer(address)]

    def __call__(self, do: Callable[[], T]) -> T:
        """Call, and return what it returns."""
        for attempt in range(RETRIES + 1):
            self._stop.check()
            try:
                return do()
            except M3Error:
                raise
            except Exception as error:
                self._stop.check()  # a client may have swallowed what ended the call
                told = self._explain(error)
                if told is None:
                    raise
                again, words = told
                if not again or attempt == RETRIES:
                    raise OutputError(f"{self.shown}: {self._hide(words)}") from None
            time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError

    def _hide(self, words: str) -> str:
        for secret in self._secrets:
            words = words.replace(secret, "***")
        return hide_secrets(" ".join(words.split()))


class _PendingList:
    """The list of what is left out: a file as soon as there is a line, published when the load is done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file: Any = None

    def write(self, line: bytes) -> None:
        if self._file is None:
            self._file = self._stack.enter_context(publish_outside(self._path.absolute()))
        self._file.write(line)

    def __enter__(self) -> _PendingList:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _send(
    folder: OutputFolder,
    shape: Shape,
    engine: Engine,
    repeats: Repeats,
    changes: Changes | None,
    lost: LeftOut,
    *,
    call: _Caller,
    meter: FileMeter,
) -> int:
    """Send rows; return how many."""
    shards = [index for index in folder.entries if changes is None or len(changes.rows[index])]
    sizes = {index: sum(file.length for file in folder.entries[index].files) for index in shards}
    meter.start(sum(sizes.values()))
    stream = prefetch(
        read_parts(folder, shards, outputs=shape.outputs, columns=shape.columns.names), depth=1, name="reading rows"
    )
    rows, left_before, done = 0, lost.rows, iter(shards)
    try:
        for part in stream:
            if part is None:
                meter.advance(sizes[next(done)])
                continue
            wanted = _pick_changed(part, changes)
            rows += wanted.num_rows
            wanted = drop_repeats(wanted, repeats, lost)
            blocks = cut_part(wanted, engine.batch_bytes, number=engine.number_bytes, weight=engine.weight_bytes)
            for block in blocks:
                batch = engine.make_batch(block, lost)
                call(lambda batch=batch: engine.upsert(batch))  # type: ignore[misc]
    finally:
        stream.close()
        meter.stop()
    return rows - (lost.rows - left_before)


def _pick_changed(part: Part, changes: Changes | None) -> Part:
    if changes is None:
        return part
    return pick(part, np.flatnonzero(np.isin(part.embeddings.rows, changes.rows[part.shard])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What differs between two folders, by the keys of rows."""

    rows: dict[int, NDArray[np.int64]]
    "by shard of the new one the rows that are new or changed, ascending"
    count: int
    "rows that are not"
    old: OutputFolder
    old_count: int
    "its rows"
    gone: NDArray[np.uint64]
    "hashes of the keys that the new one lacks, ascending"

    def write_removed_ids(self) -> Iterator[str]:
        """Yield the keys that are in the old folder only."""
        for piece in iter_parts(self.old, outputs=(), columns=KEY_COLUMNS):
            places = np.flatnonzero(is_among(hash_keys(piece.rows), self.gone))
            if len(places):
                keys = list_keys(piece.rows)
                yield from (keys[place] for place in places.tolist())


def find_changes(old: OutputFolder, new: OutputFolder, kept: Sequence[str]) -> Changes:
    """Compare two folders row by row: texts by their hashes, kept fields by their values, vectors by how they are made.

    24 bytes a row are held. A row whose key an earlier one has counts for nothing.
    """
    before, after = _sign_rows(old, kept), _sign_rows(new, kept)
    place = np.searchsorted(before.keys, after.keys).clip(max=max(0, len(before.keys) - 1))
    same = np.zeros(len(after.keys), np.bool_)
    if len(before.keys):
        same = (before.keys[place] == after.keys) & (before.signs[place] == after.signs)
    shard, row = after.shards[~same], after.rows[~same]
    return Changes(
        rows={index: np.sort(row[shard == index]) for index in new.entries},
        count=int(same.sum()),
        old=old,
        old_count=len(before.keys),
        gone=before.keys[~is_among(before.keys, after.keys)],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    """Rows with different keys, by the hashes of those, ascending."""

    keys: NDArray[np.uint64]
    signs: NDArray[np.uint64]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]


def _sign_rows(folder: OutputFolder, kept: Sequence[str]) -> _Signed:
    run = folder.run
    config = {name: value for name, value in run.config.to_json().items() if name not in MAY_DIFFER}
    names = _list_columns(folder)
    columns = [*PLAIN_COLUMNS, "num_chunks", *(name for name in kept if name in names and name != TEXT_COLUMN)]
    made = [config, run.checkpoint.hashes, run.checkpoint.tokenizer_hash, sorted(set(kept) & set(names))]
    seed = xxhash.xxh3_64_intdigest(orjson.dumps(made, option=orjson.OPT_SORT_KEYS))
    parts: list[tuple[NDArray[Any], ...]] = [(*(np.empty(0, np.uint64),) * 2, *(np.empty(0, np.int64),) * 2)]
    document, shard, hashes = 0, -1, np.empty((0, 2), np.uint64)
    for piece in iter_parts(folder, outputs=(), columns=columns):
        if piece.shard != shard:
            document, shard = 0, piece.shard
            hashes = np.load(folder.path / hashes_name(shard)).reshape(-1, 2)
        numbers = document - 1 + np.cumsum(piece.rows.column("chunk_index").to_numpy() == 0)
        document = int(numbers[-1]) + 1
        texts = hashes[numbers].tolist()
        rows = zip(*(list_values(piece.rows.column(name), lambda _: None) for name in columns), strict=True)
        signs = (
            xxhash.xxh3_64_intdigest(orjson.dumps([text, row], default=str), seed=seed)
            for text, row in zip(texts, rows, strict=True)
        )
        count = len(texts)
        parts.append(
            (hash_keys(piece.rows), np.fromiter(signs, np.uint64, count), np.full(count, shard), piece.embeddings.rows)
        )
    keys, signs_of, shards, places = map(np.concatenate, zip(*parts, strict=True))
    distinct, first = np.unique(keys, return_index=True)
    return _Signed(keys=distinct, signs=signs_of[first], shards=shards[first], rows=places[first])


def _list_columns(folder: OutputFolder) -> list[str]:
    for piece in iter_parts(folder, outputs=()):
        return list(piece.rows.column_names)
    return []


def _delete(engine: Engine, changes: Changes, call: _Caller) -> int:
    """Delete the rows that the new folder lacks; return how many keys there were."""
    deleted, keys = 0, changes.write_removed_ids()
    while some := list(islice(keys, KEYS_PER_DELETE)):
        call(lambda some=some: engine.delete(some))  # type: ignore[misc]
        deleted += len(some)
    return deleted

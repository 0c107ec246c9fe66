"""The stages between the reader and the folder, from iterator to iterator."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from m3cli.concurrency import parallel_map
from m3cli.config import ColbertForm, EncodeConfig
from m3cli.corpus.rows import ROW_HEAD_BYTES
from m3cli.encoder.batcher import WINDOW_BYTES, batch_rows, lengths_with_mcls, pack_rows, plan_windows
from m3cli.encoder.chunker import chunk_documents, cutting_of
from m3cli.encoder.colbert import bound_vectors, compress_rows
from m3cli.encoder.embeddings import restore_order, select_chunks, select_rows
from m3cli.encoder.encode import NOT_A_NUMBER, OUT_OF_MEMORY, BatchEncoder, FailedRow
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.merge import Merger, merge_chunks, plan_rows
from m3cli.encoder.model import Model
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.errors import CorpusError, ModelError
from m3cli.jobs.encode.increment import PreviousFolder
from m3cli.progress import Progress, Stage, Stopwatch
from m3cli.records import Chunks, DoneEntry, Embeddings, Origins, ShardCounts, ShardText, SkippedRow, Source
from m3cli.store.folder import RunFolder
from m3cli.store.layout import MAX_MATRIX_BYTES, RowForm

T = TypeVar("T")

COLBERT_ITEM_BYTES = 2
"float16: what a window is measured in, whatever is stored"
TOO_LARGE = "merged ColBERT matrix too large"
FIRST_ROWS = 100
"that fail for one reason before any document is encoded, and the run is aborted"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenisedShard:
    """A shard ready for the model; equal only to itself, as batches are grouped by it."""

    text: ShardText
    chunks: Chunks
    origins: Origins
    "of rows that are taken over from an older folder; the others go through the model"

    @property
    def num_taken(self) -> int:
        """Documents that are taken over."""
        return len(np.unique(self.chunks.document[self.origins.rows]))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """Some rows of the window [start, stop) of a shard."""

    shard: TokenisedShard
    start: int
    stop: int
    embeddings: Embeddings | None
    "None for a shard without rows, or one that is given up"
    given_up: bool = False
    "a document of the shard cannot be encoded: the shard comes once more, without it"


def timed(items: Iterator[T], watch: Stopwatch, stage: Stage) -> Iterator[T]:
    """Yield items, counting the time it takes to make each."""
    while True:
        with watch.count(stage):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def tokenise_shards(
    texts: Iterator[ShardText], tokenizer: Tokenizer, *, config: EncodeConfig, since: PreviousFolder | None = None
) -> Iterator[TokenisedShard]:
    """Cut the documents of each shard into rows of tokens, and find those that an older folder has."""
    cut = partial(chunk_documents, tokenizer=tokenizer, cutting=cutting_of(config))
    none = np.empty(0, np.int64)
    for text in texts:
        if since is None:
            chunks, origins = cut(text.documents), Origins(rows=none, shard=none, row=none)
        else:
            chunks, origins = since.cut(text.documents, cut)
        yield TokenisedShard(text=text, chunks=chunks, origins=origins)


class FirstRows:
    """The rows before the first document that is encoded: if all fail for one reason, the run is aborted.

    One bad row is data; FIRST_ROWS of them, or all rows there are, mean that the corpus is not what it was taken for.
    """

    def __init__(self, before: ShardCounts, *, worker: int = 0, num_workers: int = 1) -> None:
        self.decided = before.documents > 0 or worker > 0
        "whether the run goes on, whatever comes"
        self._alone = num_workers == 1
        self._count = before.skipped
        self._first: SkippedRow | None = None

    def add(self, skipped: Sequence[SkippedRow]) -> None:
        """Count the rows of a shard without documents.

        Raises:
            CorpusError: they are enough, and all fail for one reason; ModelError where that is the device's memory.
        """
        self._count += len(skipped)
        self._first = self._first or next(iter(skipped), None)
        if self._first is not None and any(row.reason != self._first.reason for row in skipped):
            self.decided = True
        elif self._count >= FIRST_ROWS:
            self._abort()
        # Of several workers none sees the rows that come next.
        self.decided = self.decided or not self._alone

    def end(self) -> None:
        """Note that there are no more rows.

        Raises:
            CorpusError: as `add`.
        """
        if not self.decided and self._first is not None:
            self._abort()

    def _abort(self) -> None:
        if self._first is None:
            return
        reason, detail = self._first.reason, self._first.detail
        remedies = {
            OUT_OF_MEMORY: "free memory on the device",
            NOT_A_NUMBER: "use another checkpoint, or --dtype float32",
            TOO_LARGE: "",  # it is in the detail
        }
        remedy = remedies.get(reason, "check the format and the fields (--text-field, --input-format)")
        raise (ModelError if reason == OUT_OF_MEMORY else CorpusError)(
            f"all of the first {self._count:,} rows, from {self._first.source} on, would be skipped: "
            f"{reason}{f' ({detail})' if detail else ''}{'; ' if remedy else ''}{remedy}"
        )


def make_encoder(
    model: Model,
    tokenizer: Tokenizer,
    *,
    config: EncodeConfig,
    load_float32: Callable[[], Model] | None = None,
    num_threads: int = 1,
) -> BatchEncoder:
    """Make the encoder that a folder's rows go through; what is merged or compressed later leaves it in float32."""
    form = config.colbert_form
    options = OutputOptions(
        outputs=config.outputs,
        special_ids=tokenizer.special_ids,
        dense_dtype="float32" if config.merges else config.dense_dtype,
        colbert_dtype="float16" if form.plain else "float32",
        vector_weights=form.by_weight,
    )
    return BatchEncoder(
        model,
        options,
        mcls=config.mcls,
        load_float32=load_float32,
        num_threads=num_threads,
        parallel_map=parallel_map,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixLimit:
    """What a merged row's ColBERT matrix may be, as it is stored."""

    form: ColbertForm
    vector_bytes: int
    "of a stored vector"

    def find_bytes(self, num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of the matrices of rows of so many tokens, at most."""
        return bound_vectors(num_tokens - 1, self.form) * self.vector_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeContext:
    """What the rows of every shard go through, and in what portions."""

    encoder: BatchEncoder
    since: PreviousFolder | None
    dedupe: bool
    max_batch_tokens: int
    window_tokens: int | None
    matrix_limit: MatrixLimit | None
    "None: there is none"
    watch: Stopwatch
    progress: Progress


def make_context(
    encoder: BatchEncoder,
    *,
    since: PreviousFolder | None,
    config: EncodeConfig,
    max_batch_tokens: int,
    watch: Stopwatch,
    progress: Progress,
) -> EncodeContext:
    """Say what every shard goes through."""
    window_tokens = limit = None
    if "colbert" in config.outputs:
        dim = encoder.model.checkpoint.hidden_size
        window_tokens = WINDOW_BYTES[encoder.model.device.type] // (dim * COLBERT_ITEM_BYTES)
        if config.long_docs == "merge" and config.format == "parquet":
            form = config.colbert_form
            limit = MatrixLimit(form=form, vector_bytes=form.vector_bytes(dim))
    return EncodeContext(
        encoder=encoder,
        since=since,
        dedupe=config.dedupe,
        max_batch_tokens=max_batch_tokens,
        window_tokens=window_tokens,
        matrix_limit=limit,
        watch=watch,
        progress=progress,
    )


def encode_batches(
    shards: Iterator[TokenisedShard], route: EncodeContext, *, sources: Sequence[Source], first_rows: FirstRows
) -> Iterator[EncodedBatch]:
    """Run each shard's rows through the model; one with documents that fail there comes again without them.

    Shards without documents are held back until it is clear that the run goes on.
    """
    held: list[EncodedBatch] = []
    for shard in shards:
        failed = list(find_oversized(shard.chunks, route.matrix_limit))
        done = False
        while failed or not done:
            if failed:
                shard = drop_documents(shard, failed, source=sources[shard.text.shard.source].name)  # noqa: PLW2901
            if not shard.text.documents and not first_rows.decided:
                first_rows.add(shard.text.skipped)
                held += encode_shard(shard, route)
                break
            failed = yield from encode_shard(shard, route)
            done = True
        else:
            first_rows.decided = True
        if first_rows.decided:
            yield from held
            held.clear()
    first_rows.end()
    yield from held


def find_oversized(chunks: Chunks, limit: MatrixLimit | None) -> Iterator[FailedRow]:
    """Yield the first row of each document whose merged ColBERT matrix may be larger than a value of Parquet."""
    # Most shards have too few tokens for one such document.
    if limit is None or len(chunks.input_ids) * limit.vector_bytes <= MAX_MATRIX_BYTES:
        return
    merged = merge_chunks(chunks)
    sizes = limit.find_bytes(merged.num_tokens)
    for number in np.flatnonzero(sizes > MAX_MATRIX_BYTES).tolist():
        yield FailedRow(
            row=int(np.searchsorted(chunks.document, merged.document[number])),
            reason=TOO_LARGE,
            detail=f"merged, its {merged.num_tokens[number]:,} tokens make a ColBERT matrix of {sizes[number]:,} bytes"
            f", and Parquet holds {MAX_MATRIX_BYTES:,}; use --format npy, --long-docs chunk or both, "
            "or --colbert-dtype, --colbert-pool or --colbert-top-k for a smaller one",
        )


def encode_shard(shard: TokenisedShard, route: EncodeContext) -> Generator[EncodedBatch, None, list[FailedRow]]:
    """Yield a shard's rows window by window, longest rows of a window first; return those that cannot be encoded.

    From the first of them on nothing but the giving up is yielded, but the rest is run to know them all.
    """
    chunks, failed = shard.chunks, list[FailedRow]()
    route.progress.begin_shard()
    if chunks.num_rows == 0:
        route.progress.advance(documents=0, tokens=0, shards=1.0)
        yield EncodedBatch(shard=shard, start=0, stop=0, embeddings=None)
    for start, stop in plan_windows(chunks.num_tokens, max_window_tokens=route.window_tokens):
        for made in encode_window(shard, route, start=start, stop=stop):
            if isinstance(made, FailedRow):
                if not failed:
                    yield EncodedBatch(shard=shard, start=start, stop=stop, embeddings=None, given_up=True)
                failed.append(made)
                continue
            if not failed:
                yield EncodedBatch(shard=shard, start=start, stop=stop, embeddings=made)
            tokens = int(chunks.num_tokens[made.rows].sum())
            route.progress.advance(
                documents=int((chunks.chunk_index[made.rows] == 0).sum()),
                tokens=tokens,
                shards=tokens / len(chunks.input_ids),
            )
    if failed:
        route.progress.withdraw_shard()
    return failed


def encode_window(
    shard: TokenisedShard, route: EncodeContext, *, start: int, stop: int
) -> Iterator[Embeddings | FailedRow]:
    """Yield the rows [start, stop): first those that an older folder has, then copies with their originals."""
    rows = np.arange(start, stop)
    if route.since is not None:
        yield from timed(route.since.take(shard.origins, start=start, stop=stop), route.watch, "encoding")
        rows = np.setdiff1d(rows, shard.origins.rows, assume_unique=True)
    originals = find_originals(shard, rows) if route.dedupe else rows
    limit = min(route.max_batch_tokens, route.encoder.max_tokens or route.max_batch_tokens)
    single = np.unique(originals)
    groups = batch_rows(
        lengths_with_mcls(shard.chunks.num_tokens[single], every=route.encoder.mcls),
        max_batch_tokens=limit,
        threads=route.encoder.num_threads,
    )
    batches = (pack_rows(shard.chunks, single[group]) for group in groups)
    for made in timed(route.encoder.encode_all(batches), route.watch, "encoding"):
        yield from copy_rows(made, rows, originals) if route.dedupe else (made,)


def find_originals(shard: TokenisedShard, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of some rows the first of them with the same place in the same text."""
    if not len(rows):
        return rows
    hashes = np.array([document.text_hash for document in shard.text.documents], np.uint64)
    _, text = np.unique(hashes, axis=0, return_inverse=True)
    keys = np.stack([text.reshape(-1)[shard.chunks.document[rows]], shard.chunks.chunk_index[rows]])
    _, first, inverse = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    return rows[first[inverse.reshape(-1)]]


def copy_rows(
    made: Embeddings | FailedRow, rows: NDArray[np.int64], originals: NDArray[np.int64]
) -> Iterator[Embeddings | FailedRow]:
    """Yield what was made for all rows that it is the original of; what fails, fails for all of them."""
    if isinstance(made, FailedRow):
        yield from (replace(made, row=row) for row in rows[originals == made.row].tolist())
        return
    order = np.argsort(made.rows)
    mine = np.isin(originals, made.rows)
    places = order[np.searchsorted(made.rows, originals[mine], sorter=order)]
    yield select_rows(made, places, rows=rows[mine])


def drop_documents(shard: TokenisedShard, failed: Sequence[FailedRow], *, source: str) -> TokenisedShard:
    """Return the shard as if the documents of these rows had never been planned; they are skipped rows of it."""
    text, chunks = shard.text, shard.chunks
    faults = {int(chunks.document[fault.row]): fault for fault in reversed(failed)}
    keep = np.ones(len(text.documents), np.bool_)
    keep[list(faults)] = False
    rows = keep[chunks.document]
    skipped = [_skip_document(shard, number, fault, source=source) for number, fault in faults.items()]
    left = select_chunks(chunks, np.flatnonzero(rows))
    return TokenisedShard(
        text=replace(
            text,
            documents=tuple(document for number, document in enumerate(text.documents) if keep[number]),
            kept=None if text.kept is None else text.kept.take(np.flatnonzero(keep)),
            skipped=tuple(sorted([*text.skipped, *skipped], key=lambda row: row.position)),
        ),
        chunks=replace(left, document=(np.cumsum(keep) - 1)[left.document]),
        origins=replace(shard.origins, rows=(np.cumsum(rows) - 1)[shard.origins.rows]),
    )


def _skip_document(shard: TokenisedShard, number: int, fault: FailedRow, *, source: str) -> SkippedRow:
    document = shard.text.documents[number]
    in_bytes = shard.text.shard.row_group < 0
    return SkippedRow(
        source=source,
        position=document.position,
        byte_offset=document.position if in_bytes else None,
        id=document.id if document.has_own_id else None,
        reason=fault.reason,
        detail=fault.detail,
        row=document.text.encode()[:ROW_HEAD_BYTES],
    )


class _ShardAborted(Exception):
    """The shard that is being written comes once more."""


def write_shard(
    folder: RunFolder,
    shard: TokenisedShard,
    batches: Iterator[EncodedBatch],
    *,
    form: RowForm,
    config: EncodeConfig,
    source: str,
    watch: Stopwatch,
) -> DoneEntry | None:
    """Write a shard's windows as they come, and commit it; None if it was given up on the way."""
    rows = plan_rows(shard.chunks, long_docs=config.long_docs, taken=shard.origins.rows)
    with (
        folder.open_shard(form=form, text=shard.text, chunks=rows, source=source) as writer,
        suppress(_ShardAborted),
    ):
        for window in finish_windows(shard, _raise_on_abort(batches), config=config):
            with watch.count("writing"):
                writer.append(window)
        with watch.count("writing"):
            entry = writer.finish()
            folder.commit(entry)
        return entry
    return None


def finish_windows(
    shard: TokenisedShard, batches: Iterator[EncodedBatch], *, config: EncodeConfig
) -> Iterator[Embeddings]:
    """Yield the rows to be written, ascending, a window at a time."""
    merger = None
    if config.merges:
        merger = Merger(
            shard.chunks,
            taken=shard.origins.rows,
            long_docs=config.long_docs,
            dense_dtype=config.dense_dtype,
            colbert_form=config.colbert_form,
        )
    first = 0
    for (start, stop), window in groupby(batches, key=lambda batch: (batch.start, batch.stop)):
        parts = (batch.embeddings for batch in window if batch.embeddings is not None)
        if start == stop:
            continue
        if merger is None:
            yield restore_order((compress_rows(part, config.colbert_form) for part in parts), start=start, stop=stop)
            continue
        merged = [compress_rows(part, config.colbert_form) for part in merge_window(parts, merger, shard)]
        last = first + sum(len(part.rows) for part in merged)
        if first < last:
            yield restore_order(merged, start=first, stop=last)
        first = last


def merge_window(parts: Iterable[Embeddings], merger: Merger, shard: TokenisedShard) -> Iterator[Embeddings]:
    """Yield the rows to be written that a window completes; what an older folder had is as it is to be written."""
    fresh = []
    for part in parts:
        if np.isin(part.rows[:1], shard.origins.rows).all():
            yield merger.number(part)
        else:
            fresh.append(part)
    if fresh:
        rows = np.sort(np.concatenate([part.rows for part in fresh]))
        renumbered = (replace(part, rows=np.searchsorted(rows, part.rows)) for part in fresh)
        yield from merger.feed(replace(restore_order(renumbered, start=0, stop=len(rows)), rows=rows))


def _raise_on_abort(batches: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
    for batch in batches:
        if batch.given_up:
            raise _ShardAborted
        yield batch

"""The pipeline of `m3 encode`, in the order in which a row passes it: read, tokenize, encode, write, commit.

    opened.read > tokenise_shards      thread "reading", one shard ahead
    encode_shards                      thread "encoding", some batches ahead; drives the device
    order_shards                       on CUDA thread "ordering", one window ahead
    write_shards                       the thread of the caller

Each stage is a generator over the stage before. From the device to the disk a shard passes as `ShardStart`, then its
batches, window by window, which become `OrderedWindow`. If a document fails in the model, `ShardAborted` ends the
shard, and the shard comes again without that document. A shard is done when its entry is on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from m3cli.concurrency import parallel_map, prefetch
from m3cli.config import ColbertForm, EncodeConfig, RunConfig
from m3cli.corpus.rows import ROW_HEAD_BYTES
from m3cli.encoder import device as machine
from m3cli.encoder import model as models
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.chunker import chunk_documents, cutting_of, lengths_with_mcls
from m3cli.encoder.embeddings import (
    Buffers,
    Merger,
    bound_vectors,
    compress_rows,
    merge_chunks,
    plan_rows,
    restore_order,
    select_chunks,
    select_rows,
)
from m3cli.encoder.encode import (
    WINDOW_BYTES,
    BatchEncoder,
    FailedRow,
    batch_rows,
    pack_rows,
    plan_windows,
)
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.model import Model
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.jobs.encode.increment import PreviousFolder
from m3cli.jobs.encode.lifecycle import TOO_LARGE, FirstRows
from m3cli.progress import Progress, Stopwatch
from m3cli.records import Batch, Chunks, DoneEntry, Embeddings, Origins, Output, ShardText, SkippedRow
from m3cli.store.folder import RunFolder
from m3cli.store.layout import MAX_MATRIX_BYTES, RowForm

BATCHES_AHEAD = {"with colbert": 4, "without": 64}
"finished batches that may wait for the next stage; without ColBERT one of 65,536 tokens is about a MiB"
WINDOWS_AHEAD = {"cpu": 0, "cuda": 1}
"ordered windows that may wait for the writer; 0: the writer's thread orders them, as a CPU has no core to spare"
QUANTISES = {"cpu": False, "cuda": True}
"whether ColBERT vectors are rounded before they are copied to the host; else `compress_rows` does it"
COLBERT_ITEM_BYTES = 2
"float16: the unit of a window's size, whatever is stored"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenisedShard:
    """A shard ready for the model; equal only to itself, as batches are grouped by it."""

    text: ShardText
    chunks: Chunks
    origins: Origins
    "of rows whose vectors are reused from a previous folder; the others go through the model"
    linked: DoneEntry | None = None
    "of a previous folder, whose files are linked; the shard has no chunks then"

    @property
    def num_reused(self) -> int:
        """Documents whose vectors are reused."""
        if self.linked is not None:
            return self.linked.counts.documents
        return len(np.unique(self.chunks.document[self.origins.rows]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStart:
    """The first item of a shard."""

    shard: TokenisedShard


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """Some rows of the window [start, stop) of a shard."""

    shard: TokenisedShard
    start: int
    stop: int
    embeddings: Embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAborted:
    """The last item of a shard with documents that cannot be encoded; the shard comes again without them."""

    shard: TokenisedShard


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderedWindow:
    """The rows of a window as they are to be written, ascending."""

    shard: TokenisedShard
    embeddings: Embeddings


ShardItem = ShardStart | EncodedBatch | ShardAborted
OrderedItem = ShardStart | OrderedWindow | ShardAborted


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What all shards of a run pass through."""

    run: RunConfig
    form: RowForm
    folder: RunFolder
    tokenizer: Tokenizer
    encoder: BatchEncoder
    previous: PreviousFolder | None
    "whose vectors are reused; None: there is none"
    first_rows: FirstRows
    watch: Stopwatch
    progress: Progress
    poll: Callable[[], None]
    "called with every batch, on CUDA in a thread of the pipeline; raises to end the run"

    @property
    def config(self) -> EncodeConfig:
        """The options that decide the bytes."""
        return self.run.config

    def source_of(self, text: ShardText) -> str:
        """Return the name of a shard's source."""
        return self.run.sources[text.shard.source].name


def run_pipeline(
    texts: Iterator[ShardText], pipeline: Pipeline
) -> Generator[tuple[TokenisedShard, DoneEntry], None, None]:
    """Encode shards and commit them; yield each with its entry once it is on disk."""
    tokenised = pipeline.watch.count_each("reading", tokenise_shards(texts, pipeline))
    shards = prefetch(tokenised, depth=1, name="reading")
    depth = BATCHES_AHEAD["with colbert" if "colbert" in pipeline.config.outputs else "without"]
    items = prefetch(encode_shards(shards, pipeline), depth=depth, name="encoding")
    ordered = order_shards(_poll(items, pipeline), pipeline)
    if (windows := WINDOWS_AHEAD[pipeline.encoder.model.device.type]) > 0:
        ordered = prefetch(ordered, depth=windows, name="ordering")
    try:
        yield from write_shards(ordered, pipeline)
    finally:
        ordered.close()
        items.close()


def tokenise_shards(texts: Iterator[ShardText], pipeline: Pipeline) -> Iterator[TokenisedShard]:
    """Cut the documents of each shard into rows of tokens, and find those that a previous folder has."""
    cut = partial(chunk_documents, tokenizer=pipeline.tokenizer, cutting=cutting_of(pipeline.config))
    none = np.empty(0, np.int64)
    nothing = Origins(rows=none, shard=none, row=none)
    previous = pipeline.previous
    for text in texts:
        if previous is None:
            yield TokenisedShard(text=text, chunks=cut(text.documents), origins=nothing)
            continue
        linked = previous.link(text, source=pipeline.source_of(text), form=pipeline.form, into=pipeline.folder)
        if linked is not None:
            yield TokenisedShard(text=text, chunks=cut(()), origins=nothing, linked=linked)
            continue
        chunks, origins = previous.cut(text.documents, cut)
        yield TokenisedShard(text=text, chunks=chunks, origins=origins)


def encode_shards(shards: Iterator[TokenisedShard], pipeline: Pipeline) -> Iterator[ShardItem]:
    """Run the rows of each shard through the model, without the documents that fail there.

    Shards without documents are held back until it is clear that the run continues.
    """
    held: list[ShardItem] = []
    first_rows, limit = pipeline.first_rows, matrix_limit(pipeline)
    for shard in shards:
        failed = list(find_oversized(shard.chunks, limit))
        done = False
        while failed or not done:
            if failed:
                shard = drop_documents(shard, failed, source=pipeline.source_of(shard.text))  # noqa: PLW2901
            if not shard.text.documents and not first_rows.decided:
                first_rows.add(shard.text.skipped)
                held += encode_shard(shard, pipeline)
                break
            failed = yield from encode_shard(shard, pipeline)
            done = True
        else:
            first_rows.decided = True
        if first_rows.decided:
            yield from held
            held.clear()
    first_rows.end()
    yield from held


def encode_shard(shard: TokenisedShard, pipeline: Pipeline) -> Generator[ShardItem, None, list[FailedRow]]:
    """Yield a shard's rows window by window, longest rows of a window first; return the rows that failed.

    After the first failure the other rows are still encoded, to know all that fail, but not yielded.
    """
    chunks, failed, progress = shard.chunks, list[FailedRow](), pipeline.progress
    progress.begin_shard()
    yield ShardStart(shard=shard)
    if chunks.num_rows == 0:
        progress.advance(documents=0, tokens=0, shards=1.0)
    for window, result in encode_windows(shard, pipeline):
        if isinstance(result, FailedRow):
            if not failed:
                yield ShardAborted(shard=shard)
            failed.append(result)
            continue
        if not failed:
            yield EncodedBatch(shard=shard, start=window.start, stop=window.stop, embeddings=result)
        tokens = int(chunks.num_tokens[result.rows].sum())
        progress.advance(
            documents=int((chunks.chunk_index[result.rows] == 0).sum()),
            tokens=tokens,
            shards=tokens / len(chunks.input_ids),
        )
    if failed:
        progress.withdraw_shard()
    return failed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWindow:
    """The rows [start, stop) of a shard that are sorted by length together."""

    start: int
    stop: int
    rows: NDArray[np.int64]
    "that go through the model"
    originals: NDArray[np.int64]
    "of those, the first row with the same text"


def encode_windows(shard: TokenisedShard, pipeline: Pipeline) -> Iterator[tuple[PlannedWindow, Embeddings | FailedRow]]:
    """Yield the rows of each window: first those that a previous folder has, then copies with their originals.

    The batches of all windows are one sequence, so that the device goes on from one window to the next.
    """
    planned, encoder, budget = deque[PlannedWindow](), pipeline.encoder, pipeline.run.runtime.max_batch_tokens
    max_window_tokens = window_tokens(pipeline.config.outputs, encoder.model)

    def plan_batches() -> Iterator[Batch]:
        for start, stop in plan_windows(shard.chunks.num_tokens, max_window_tokens=max_window_tokens):
            window = plan_window(shard, pipeline, start=start, stop=stop)
            planned.append(window)
            yield from pack_batches(shard.chunks, np.unique(window.originals), encoder, max_batch_tokens=budget)

    def open_window() -> Iterator[tuple[PlannedWindow, Embeddings | FailedRow]]:
        window = planned.popleft()
        if pipeline.previous is not None:
            reused = pipeline.previous.read(shard.origins, start=window.start, stop=window.stop)
            yield from ((window, made) for made in pipeline.watch.count_each("encoding", reused))

    stop = 0
    for result in pipeline.watch.count_each("encoding", encoder.encode_all(plan_batches())):
        row = result.row if isinstance(result, FailedRow) else int(result.rows[0])
        while row >= stop:
            window, stop = planned[0], planned[0].stop
            yield from open_window()
        made = copy_rows(result, window.rows, window.originals) if pipeline.config.dedupe else (result,)
        yield from ((window, each) for each in made)
    while planned:
        yield from open_window()


def plan_window(shard: TokenisedShard, pipeline: Pipeline, *, start: int, stop: int) -> PlannedWindow:
    """Return which of the rows [start, stop) go through the model."""
    rows = np.arange(start, stop)
    if pipeline.previous is not None:
        rows = np.setdiff1d(rows, shard.origins.rows, assume_unique=True)
    originals = find_originals(shard, rows) if pipeline.config.dedupe else rows
    return PlannedWindow(start=start, stop=stop, rows=rows, originals=originals)


def pack_batches(
    chunks: Chunks, rows: NDArray[np.int64], encoder: BatchEncoder, *, max_batch_tokens: int
) -> Iterator[Batch]:
    """Yield some rows in batches, longest rows first."""
    groups = batch_rows(
        lengths_with_mcls(chunks.num_tokens[rows], every=encoder.mcls),
        max_batch_tokens=min(max_batch_tokens, encoder.max_tokens or max_batch_tokens),
        threads=encoder.num_threads,
    )
    return (pack_rows(chunks, rows[group]) for group in groups)


def order_shards(items: Iterator[ShardItem], pipeline: Pipeline) -> Generator[OrderedItem, None, None]:
    """Yield the windows of each shard in the order in which they are written."""
    buffers = Buffers()
    for shard, its_items in groupby(items, key=lambda item: item.shard):
        yield ShardStart(shard=shard)
        try:
            for window in finish_windows(shard, _batches_of(its_items), config=pipeline.config, buffers=buffers):
                yield OrderedWindow(shard=shard, embeddings=window)
                del window  # the writer may be the last to hold it
        except _Aborted:
            yield ShardAborted(shard=shard)


def write_shards(items: Iterator[OrderedItem], pipeline: Pipeline) -> Iterator[tuple[TokenisedShard, DoneEntry]]:
    """Write each shard as its windows come and commit it; yield it with its entry."""
    for shard, its_items in groupby(items, key=lambda item: item.shard):
        entry = write_shard(shard, its_items, pipeline)
        if entry is not None:
            yield shard, entry


def _poll(items: Iterator[ShardItem], pipeline: Pipeline) -> Iterator[ShardItem]:
    for item in items:
        pipeline.poll()
        yield item


def write_shard(shard: TokenisedShard, items: Iterator[OrderedItem], pipeline: Pipeline) -> DoneEntry | None:
    """Write a shard's windows and commit it; None if it was aborted, and nothing of it is kept."""
    config, folder = pipeline.config, pipeline.folder
    if shard.linked is not None:
        folder.commit(shard.linked)
        return shard.linked
    rows = plan_rows(shard.chunks, long_docs=config.long_docs, taken=shard.origins.rows)
    source = pipeline.source_of(shard.text)
    with folder.open_shard(form=pipeline.form, text=shard.text, chunks=rows, source=source) as writer:
        for item in items:
            if isinstance(item, ShardAborted):
                return None
            if isinstance(item, OrderedWindow):
                with pipeline.watch.count("writing"):
                    writer.append(item.embeddings)
            del item  # a window of ColBERT vectors is large
        with pipeline.watch.count("writing"):
            entry = writer.finish()
            folder.commit(entry)
        return entry


class _Aborted(Exception):
    """The shard that is being ordered was aborted."""


def _batches_of(items: Iterator[ShardItem]) -> Iterator[EncodedBatch]:
    """Yield the batches of a shard; raise _Aborted where the shard is aborted."""
    for item in items:
        if isinstance(item, ShardAborted):
            raise _Aborted
        if isinstance(item, EncodedBatch):
            yield item


def finish_windows(
    shard: TokenisedShard,
    batches: Iterator[EncodedBatch],
    *,
    config: EncodeConfig,
    buffers: Buffers | None = None,
    compress: bool = True,
) -> Iterator[Embeddings]:
    """Yield the rows to be written, ascending, a window at a time: long documents merged, ColBERT compressed."""

    def store(part: Embeddings) -> Embeddings:
        return compress_rows(part, config.colbert_form) if compress else part

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
        parts = (batch.embeddings for batch in window)
        if merger is None:
            yield restore_order(map(store, parts), start=start, stop=stop, buffers=buffers)
            continue
        merged = [store(part) for part in merge_window(parts, merger, shard)]
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


def make_encoder(
    model: Model,
    tokenizer: Tokenizer,
    *,
    config: EncodeConfig,
    retries: Sequence[Callable[[], Model]] = (),
    num_threads: int = 1,
) -> BatchEncoder:
    """Make the encoder that a folder's rows go through; what is merged or compressed later leaves it in float32."""
    form = config.colbert_form
    on_device = QUANTISES[model.device.type] and not config.merges and form == ColbertForm(dtype=form.dtype)
    options = OutputOptions(
        outputs=config.outputs,
        special_ids=tokenizer.special_ids,
        dense_dtype="float32" if config.merges else config.dense_dtype,
        colbert_dtype="float16" if form.plain else "float32",
        quantise=form.dtype if on_device and form.dtype != "float16" else None,
        vector_weights=form.by_weight,
    )
    return BatchEncoder(
        model,
        options,
        mcls=config.mcls,
        retries=retries,
        num_threads=num_threads,
        parallel_map=parallel_map,
    )


def load_encoder(run: RunConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, *, device: str) -> BatchEncoder:
    """Load the model of a run and warm it up; torch's threads are then those of one batch."""
    dtype, runtime = run.config.dtype, run.runtime
    machine.set_threads(runtime.threads)
    model = models.load_model(checkpoint, device=device, dtype=dtype)
    num_threads = machine.plan_threads(runtime.threads, device=device)
    machine.set_threads(runtime.threads // num_threads)
    retries = models.load_retries(checkpoint, device=device, dtype=dtype)
    encoder = make_encoder(model, tokenizer, config=run.config, retries=retries, num_threads=num_threads)
    encoder.warm_up(runtime.max_batch_tokens)
    return encoder


def window_tokens(outputs: Collection[Output], model: Model) -> int | None:
    """Return the most tokens of a window, by the bytes of their ColBERT vectors; None: a window is a shard."""
    if "colbert" not in outputs:
        return None
    return WINDOW_BYTES[model.device.type] // (model.checkpoint.hidden_size * COLBERT_ITEM_BYTES)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixLimit:
    """How the ColBERT matrix of a merged row is stored, to know its size."""

    form: ColbertForm
    vector_bytes: int
    "of a stored vector"

    def find_bytes(self, num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the most bytes that the matrices of rows of so many tokens take."""
        return bound_vectors(num_tokens - 1, self.form) * self.vector_bytes


def matrix_limit(pipeline: Pipeline) -> MatrixLimit | None:
    """Return what limits merged ColBERT matrices, which is a value of Parquet; None: nothing does."""
    config = pipeline.config
    if "colbert" not in config.outputs or config.long_docs != "merge" or config.format != "parquet":
        return None
    form = config.colbert_form
    return MatrixLimit(form=form, vector_bytes=form.vector_bytes(pipeline.run.checkpoint.dim))


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

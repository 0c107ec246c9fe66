"""The stages between the reader and the folder, from iterator to iterator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from m3cli.config import Meaning
from m3cli.encoder.batcher import WINDOW_BYTES, pack_batches, plan_windows
from m3cli.encoder.chunker import chunk_documents
from m3cli.encoder.encode import encode_batch
from m3cli.encoder.model import Model
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.encoder.window import order_rows
from m3cli.errors import CorpusError
from m3cli.progress import Progress, Stage, Stopwatch
from m3cli.records import Chunks, DoneEntry, Embeddings, ShardText
from m3cli.store.folder import RunFolder
from m3cli.store.layout import RowForm

T = TypeVar("T")

COLBERT_ITEM_BYTES = 2
"float16"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenisedShard:
    """A shard ready for the model; equal only to itself, as batches are grouped by it."""

    text: ShardText
    chunks: Chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """Some rows of the window [start, stop) of a shard."""

    shard: TokenisedShard
    start: int
    stop: int
    embeddings: Embeddings | None
    "None for a shard without rows"


def count_seconds(items: Iterator[T], watch: Stopwatch, stage: Stage) -> Iterator[T]:
    """Yield items, counting the time it takes to make each."""
    while True:
        with watch.count(stage):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def tokenise_shards(texts: Iterator[ShardText], tokenizer: Tokenizer, *, meaning: Meaning) -> Iterator[TokenisedShard]:
    """Cut the documents of each shard into rows of tokens."""
    for text in texts:
        refuse_hopeless(text)
        chunks = chunk_documents(
            text.documents,
            tokenizer,
            max_length=meaning.max_length,
            overlap=meaning.overlap,
            long_docs=meaning.long_docs,
            prefix=meaning.prefix,
        )
        yield TokenisedShard(text=text, chunks=chunks)


def refuse_hopeless(text: ShardText) -> None:
    """Stop a run whose first shard is skipped whole for one reason: the corpus is not what it was taken for.

    Raises:
        CorpusError: naming the reason.
    """
    reasons = {skipped.reason for skipped in text.skipped}
    if text.shard.index == 0 and not text.documents and len(reasons) == 1:
        first = text.skipped[0]
        detail = f" ({first.detail})" if first.detail else ""
        raise CorpusError(
            f"all {len(text.skipped):,} rows of the first shard, from {first.source}, would be skipped: "
            f"{first.reason}{detail}; check the format and the fields (--text-field, --input-format)"
        )


def encode_batches(
    shards: Iterator[TokenisedShard],
    model: Model,
    *,
    meaning: Meaning,
    max_batch_tokens: int,
    special_ids: frozenset[int],
    watch: Stopwatch,
    progress: Progress,
) -> Iterator[EncodedBatch]:
    """Run each shard's rows through the model, window by window, longest rows of a window first."""
    window_tokens = None
    if "colbert" in meaning.outputs:
        vector_bytes = model.checkpoint.hidden_size * COLBERT_ITEM_BYTES
        window_tokens = WINDOW_BYTES[model.device.type] // vector_bytes
    for shard in shards:
        chunks = shard.chunks
        if chunks.num_rows == 0:
            progress.advance(documents=0, tokens=0, shards=1.0)
            yield EncodedBatch(shard=shard, start=0, stop=0, embeddings=None)
        for start, stop in plan_windows(chunks.num_tokens, max_window_tokens=window_tokens):
            for batch in pack_batches(chunks, start=start, stop=stop, max_batch_tokens=max_batch_tokens):
                made = encode_batch(
                    model, batch, outputs=meaning.outputs, special_ids=special_ids, dense_dtype=meaning.dense_dtype
                )
                for embeddings in count_seconds(made, watch, "encoding"):
                    yield EncodedBatch(shard=shard, start=start, stop=stop, embeddings=embeddings)
                tokens = len(batch.input_ids)
                progress.advance(
                    documents=int((chunks.chunk_index[batch.rows] == 0).sum()),
                    tokens=tokens,
                    shards=tokens / len(chunks.input_ids),
                )


def write_shard(
    folder: RunFolder,
    shard: TokenisedShard,
    batches: Iterator[EncodedBatch],
    *,
    form: RowForm,
    source: str,
    watch: Stopwatch,
) -> DoneEntry:
    """Write a shard's windows as they come, and commit it."""
    with folder.open_shard(form=form, text=shard.text, chunks=shard.chunks, source=source) as writer:
        for (start, stop), window in groupby(batches, key=lambda batch: (batch.start, batch.stop)):
            parts = (batch.embeddings for batch in window if batch.embeddings is not None)
            if start < stop:
                ordered = order_rows(parts, shard.chunks, start=start, stop=stop)
                with watch.count("writing"):
                    writer.append(ordered)
        with watch.count("writing"):
            entry = writer.finish()
            folder.commit(entry)
    return entry

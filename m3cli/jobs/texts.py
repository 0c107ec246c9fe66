"""Encode texts in memory with the stages of `m3 encode`: equal texts, chunks and batches give equal numbers.

A list of texts is encoded like one shard: cut into rows, rows into windows and batches, and put in order again. What
`m3 encode` rounds to float16 stays float32 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from m3cli.concurrency import parallel_map, take_turn
from m3cli.config import EncodeConfig, LongDocs
from m3cli.encoder import device as machine
from m3cli.encoder.chunker import chunk_documents, cutting_of
from m3cli.encoder.embeddings import concat_embeddings, plan_rows
from m3cli.encoder.encode import BatchEncoder, FailedRow, TextEncoder, plan_windows
from m3cli.errors import ModelError
from m3cli.jobs.encode.pipeline import (
    EncodedBatch,
    TokenisedShard,
    finish_windows,
    pack_batches,
    window_tokens,
)
from m3cli.records import (
    Chunks,
    Document,
    Embeddings,
    Fields,
    LexicalWeights,
    Origins,
    Shard,
    ShardText,
    TokenMatrices,
)

MIN_TOKENS_AT_ONCE = 512
"of all rows, for several batches at once"
_NO_ROWS = np.empty(0, np.int64)


def encode_texts(
    encoder: TextEncoder, texts: Sequence[str], *, max_length: int, long_docs: LongDocs
) -> tuple[Embeddings, Chunks]:
    """Return the float32 embeddings of texts, and their rows in the same order.

    A call uses the threads of `auto_threads`, and leaves them to torch. Calls from several threads take turns.

    Raises:
        ModelError: a text cannot be encoded.
    """
    config = EncodeConfig(
        fields=Fields(text="", id=None, title=None, kept=(), columns=(), header=False),
        outputs=encoder.outputs,
        max_length=max_length,
        dtype=encoder.dtype,
        shard_size=1,
        long_docs=long_docs,
        dense_dtype="float32",
    )
    shard = _tokenise(encoder, texts, config)
    rows = plan_rows(shard.chunks, long_docs=long_docs, taken=_NO_ROWS)
    with take_turn():
        threads = machine.auto_threads()
        at_once = plan_at_once(shard.chunks.num_tokens, threads=threads, device=encoder.device)
        machine.set_threads(threads // at_once)
        try:
            batches = _encode(shard, encoder, encoder.make_encoder(num_threads=at_once, parallel_map=parallel_map))
            windows = list(finish_windows(shard, batches, config=config, compress=False))
        finally:
            machine.set_threads(threads)
    return concat_embeddings(windows) if windows else _make_empty(encoder), rows


def plan_at_once(num_tokens: NDArray[np.int64], *, threads: int, device: str) -> int:
    """Return how many batches of rows of so many tokens go through the model at once.

    One batch with all threads reads the weights once. For few tokens that is faster (scripts/bench_results/LOG.md).
    """
    if len(num_tokens) == 1 or num_tokens.sum() < MIN_TOKENS_AT_ONCE:
        return 1
    return machine.plan_threads(threads, device=device)


def _tokenise(encoder: TextEncoder, texts: Sequence[str], config: EncodeConfig) -> TokenisedShard:
    documents = tuple(
        Document(id=str(index), text=text, text_hash=(0, 0), has_own_id=False, position=index)
        for index, text in enumerate(texts)
    )
    shard = Shard(index=0, source=0, start=0, stop=len(texts))
    return TokenisedShard(
        text=ShardText(shard=shard, documents=documents, kept=None, skipped=(), input_hash=""),
        chunks=chunk_documents(documents, tokenizer=encoder.tokenizer, cutting=cutting_of(config)),
        origins=Origins(rows=_NO_ROWS, shard=_NO_ROWS, row=_NO_ROWS),
    )


def _encode(shard: TokenisedShard, encoder: TextEncoder, batches: BatchEncoder) -> Iterator[EncodedBatch]:
    chunks = shard.chunks
    max_window_tokens = window_tokens(encoder.outputs, encoder.model)
    for start, stop in plan_windows(chunks.num_tokens, max_window_tokens=max_window_tokens):
        rows = np.arange(start, stop)
        for result in batches.encode_all(
            pack_batches(chunks, rows, batches, max_batch_tokens=encoder.max_batch_tokens)
        ):
            if isinstance(result, FailedRow):
                text = int(chunks.document[result.row])
                raise ModelError(f"text {text} cannot be encoded: {result.reason} ({result.detail})")
            yield EncodedBatch(shard=shard, start=start, stop=stop, embeddings=result)


def _make_empty(encoder: TextEncoder) -> Embeddings:
    """Return the embeddings of no texts."""
    indptr, vectors = np.zeros(1, np.int64), np.empty((0, encoder.checkpoint.hidden_size), np.float32)
    weights = LexicalWeights(indptr=indptr, indices=np.empty(0, np.uint32), values=np.empty(0, np.float32))
    return Embeddings(
        rows=_NO_ROWS,
        dense_vecs=vectors if "dense" in encoder.outputs else None,
        lexical_weights=weights if "sparse" in encoder.outputs else None,
        colbert_vecs=TokenMatrices(indptr=indptr, vectors=vectors) if "colbert" in encoder.outputs else None,
    )

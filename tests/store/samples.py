"""Shards of texts, chunks and vectors that agree with each other, from a seed and without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash

from m3cli.config import (
    ALL_OUTPUTS,
    CheckpointConfig,
    EncodeConfig,
    Format,
    RunConfig,
    Runtime,
    VectorDtype,
)
from m3cli.records import (
    Chunks,
    Document,
    Embeddings,
    Fields,
    LexicalWeights,
    Output,
    Shard,
    ShardText,
    SkippedRow,
    Source,
    TokenMatrices,
)
from m3cli.store.layout import RowForm

DIM = 8
VOCABULARY = 50
KEPT = pa.schema([("lang", pa.string()), ("year", pa.int32()), ("tags", pa.list_(pa.string()))])


def make_form(
    format: Format = "parquet",  # noqa: A002 - the flag's name
    *,
    outputs: tuple[Output, ...] = ALL_OUTPUTS,
    dense_dtype: VectorDtype = "float16",
    keep_text: bool = False,
    kept: pa.Schema | None = None,
) -> RowForm:
    return RowForm(
        format=format,
        outputs=outputs,
        dim=DIM,
        vocabulary=VOCABULARY,
        dense_dtype=dense_dtype,
        keep_text=keep_text,
        kept=kept,
    )


def make_run(
    *,
    outputs: tuple[Output, ...] = ALL_OUTPUTS,
    keep_text: bool = False,
    prefix: str = "",
    dim: int = DIM,
    vocabulary: int = VOCABULARY,
) -> RunConfig:
    return RunConfig(
        config=EncodeConfig(
            fields=Fields(text="text", id="id", title=None, kept=(), columns=(), header=False),
            outputs=outputs,
            max_length=64,
            dtype="float32",
            shard_size=1000,
            keep_text=keep_text,
            prefix=prefix,
        ),
        checkpoint=CheckpointConfig(
            name="tiny",
            path="/models/tiny",
            revision=None,
            dim=dim,
            vocabulary=vocabulary,
            hashes={"config.json": "1" * 32},
            tokenizer_hash="2" * 32,
        ),
        sources=(
            Source(name="corpus.jsonl", path="corpus.jsonl", format="jsonl", compression="none", size=9, mtime_ns=0),
        ),
        runtime=Runtime(max_batch_tokens=64, threads=1),
    )


def make_text(index: int = 0, *, documents: int = 5, skipped: int = 0, kept: bool = False) -> ShardText:
    texts = [f"text {number} of shard {index}: été 中文" for number in range(documents)]
    table = None
    if kept:
        columns = {
            "lang": ["fr" if number % 2 else None for number in range(documents)],
            "year": list(range(2000, 2000 + documents)),
            "tags": [["a"] * (number % 3) for number in range(documents)],
        }
        table = pa.table(columns, schema=KEPT)
    return ShardText(
        shard=Shard(index=index, source=0, start=index * 1000, stop=(index + 1) * 1000),
        documents=tuple(_document(index, number, text) for number, text in enumerate(texts)),
        kept=table,
        skipped=tuple(_skipped(number) for number in range(skipped)),
        input_hash=f"{index:032x}",
    )


def _document(index: int, number: int, text: str) -> Document:
    digest = xxhash.xxh3_128_intdigest(text.encode())
    halves = (digest >> 64, digest & (2**64 - 1))
    return Document(id=f"{index}-{number}", text=text, text_hash=halves, has_own_id=number % 2 == 0, position=number)


def _skipped(number: int) -> SkippedRow:
    return SkippedRow(
        source="corpus.jsonl",
        position=number * 10,
        byte_offset=number * 10,
        id="\ud800" if number else None,
        reason="invalid JSON",
        detail="",
        row=b"\xff" + b"x" * 70_000,
    )


def make_chunks(text: ShardText, *, lengths: Sequence[Sequence[int]]) -> Chunks:
    """Give each document chunks of these lengths in tokens."""
    document = [number for number, chunks in enumerate(lengths) for _ in chunks]
    flat = [length for chunks in lengths for length in chunks]
    sizes = [len(text.documents[number].text) for number in document]
    return Chunks(
        input_ids=np.arange(sum(flat), dtype=np.int32) % VOCABULARY,
        cu_seqlens=np.concatenate([[0], np.cumsum(flat)]).astype(np.int64),
        document=np.array(document, dtype=np.int64),
        chunk_index=np.array([k for chunks in lengths for k in range(len(chunks))], dtype=np.int32),
        num_chunks=np.array([len(chunks) for chunks in lengths for _ in chunks], dtype=np.int32),
        char_start=np.array([size // 3 for size in sizes], dtype=np.int64),
        char_end=np.array(sizes, dtype=np.int64),
        truncated=np.array([length % 3 == 0 for length in flat], dtype=np.bool_),
        num_repeated=np.zeros(len(flat), np.int32),
    )


def make_embeddings(chunks: Chunks, *, outputs: Sequence[Output] = ALL_OUTPUTS, seed: int = 0) -> Embeddings:
    """Return embeddings of all rows of a shard."""
    random = np.random.default_rng(seed)
    rows, lengths = chunks.num_rows, chunks.num_tokens
    counts = np.array([random.integers(0, min(length, VOCABULARY)) for length in lengths], dtype=np.int64)
    indices = [np.sort(random.choice(VOCABULARY, count, replace=False)) for count in counts]
    dense = random.standard_normal((rows, DIM), dtype=np.float32).astype(np.float16)
    vectors = random.standard_normal((int(lengths.sum()) - rows, DIM), dtype=np.float32).astype(np.float16)
    lexical = LexicalWeights(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        indices=np.concatenate([np.empty(0), *indices]).astype(np.uint32),
        values=random.random(int(counts.sum()), dtype=np.float32) + np.float32(0.01),
    )
    colbert = TokenMatrices(indptr=np.concatenate([[0], np.cumsum(lengths - 1)]).astype(np.int64), vectors=vectors)
    return Embeddings(
        rows=np.arange(rows, dtype=np.int64),
        dense_vecs=dense if "dense" in outputs else None,
        lexical_weights=lexical if "sparse" in outputs else None,
        colbert_vecs=colbert if "colbert" in outputs else None,
    )


def cut_windows(embeddings: Embeddings, cuts: Sequence[int]) -> Iterator[Embeddings]:
    """Cut a shard's embeddings before these rows."""
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < len(embeddings.rows)), len(embeddings.rows)]
    for first, last in pairwise(bounds):
        yield take_rows(embeddings, first, last)


def take_rows(embeddings: Embeddings, first: int, last: int) -> Embeddings:
    dense, lexical, colbert = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    if lexical is not None:
        span = slice(lexical.indptr[first], lexical.indptr[last])
        lexical = LexicalWeights(
            indptr=lexical.indptr[first : last + 1] - span.start,
            indices=lexical.indices[span],
            values=lexical.values[span],
        )
    if colbert is not None:
        span = slice(colbert.indptr[first], colbert.indptr[last])
        colbert = TokenMatrices(indptr=colbert.indptr[first : last + 1] - span.start, vectors=colbert.vectors[span])
    return Embeddings(
        rows=embeddings.rows[first:last],
        dense_vecs=None if dense is None else dense[first:last],
        lexical_weights=lexical,
        colbert_vecs=colbert,
    )


def same_embeddings(left: Embeddings, right: Embeddings) -> bool:
    """Whether two have the same rows and bit-equal outputs."""
    return all(
        (first is None) == (second is None) and (first is None or second is None or np.array_equal(first, second))
        for first, second in zip(_arrays(left), _arrays(right), strict=True)
    )


def _arrays(embeddings: Embeddings) -> list[np.ndarray | None]:
    lexical, colbert = embeddings.lexical_weights, embeddings.colbert_vecs
    return [
        embeddings.rows,
        embeddings.dense_vecs,
        *((None,) * 3 if lexical is None else (lexical.indptr, lexical.indices, lexical.values)),
        *((None,) * 2 if colbert is None else (colbert.indptr, colbert.vectors)),
    ]

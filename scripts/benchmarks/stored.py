"""Output folders written from arrays in memory, for the benches of search, export and the writer.

Of the benches only this module, `m3`, `busy`, `gpu` and `kernels` import m3cli's internals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from m3cli.config import CheckpointConfig, EncodeConfig, RunConfig, Runtime
from m3cli.jobs.search.vectors import Target, search_single
from m3cli.records import (
    Chunks,
    Document,
    Embeddings,
    Fields,
    LexicalWeights,
    Output,
    Shard,
    ShardText,
    Source,
    TokenMatrices,
)
from m3cli.store.folder import RunFolder, open_run_folder
from m3cli.store.layout import RowForm
from m3cli.store.reader import iter_parts, open_folder

SHARD_ROWS = 20_000
VOCABULARY = 250_002


def make_rows(index: int, count: int, *, tokens: int) -> tuple[ShardText, Chunks]:
    """Return a shard of `count` documents, one chunk each, of `tokens` tokens."""
    documents = tuple(
        Document(
            id=f"d{index * SHARD_ROWS + row}",
            text="text",
            text_hash=divmod(xxhash.xxh3_128_intdigest(b"%d" % row), 1 << 64),
            has_own_id=True,
            position=row,
        )
        for row in range(count)
    )
    first = index * SHARD_ROWS
    shard = Shard(index=index, source=0, start=first, stop=first + count)
    text = ShardText(shard=shard, documents=documents, kept=None, skipped=(), input_hash="0" * 32)
    zeros = np.zeros(count, np.int32)
    chunks = Chunks(
        input_ids=np.zeros(count * tokens, np.int32),
        cu_seqlens=np.arange(count + 1, dtype=np.int64) * tokens,
        document=np.arange(count),
        chunk_index=zeros,
        num_chunks=zeros + 1,
        char_start=np.zeros(count, np.int64),
        char_end=np.full(count, 4, np.int64),
        truncated=np.zeros(count, np.bool_),
        num_repeated=zeros,
    )
    return text, chunks


def write_shard(
    folder: RunFolder, form: RowForm, text: ShardText, chunks: Chunks, windows: Iterable[Embeddings]
) -> None:
    """Write and commit a shard."""
    with folder.open_shard(form=form, text=text, chunks=chunks, source="bench") as writer:
        for window in windows:
            writer.append(window)
        folder.commit(writer.finish())


def write_colbert(out: Path, windows: list[NDArray[np.float16]], *, tokens: int, **form: Any) -> None:
    """Write one shard of ColBERT vectors, [rows * (tokens - 1), D] per window."""
    made, start = [], 0
    for vectors in windows:
        count = len(vectors) // (tokens - 1)
        matrices = TokenMatrices(indptr=np.arange(count + 1) * (tokens - 1), vectors=vectors)
        rows = np.arange(start, start + count)
        made.append(Embeddings(rows=rows, dense_vecs=None, lexical_weights=None, colbert_vecs=matrices))
        start += count
    text, chunks = make_rows(0, start, tokens=tokens)
    layout = RowForm(outputs=("colbert",), dim=windows[0].shape[1], vocabulary=250002, **form)
    with open_run_folder(out) as folder:
        write_shard(folder, layout, text, chunks, made)


def make_run(dim: int, *, outputs: tuple[Output, ...] = ("dense",)) -> RunConfig:
    """Return the run.json of a folder."""
    return RunConfig(
        config=EncodeConfig(
            fields=Fields(text="text", id="id", title=None, kept=(), columns=(), header=False),
            outputs=outputs,
            max_length=512,
            dtype="float32",
            shard_size=1 << 20,
        ),
        checkpoint=CheckpointConfig(
            name="random", path="random", revision=None, dim=dim, vocabulary=VOCABULARY, hashes={}, tokenizer_hash="0"
        ),
        sources=(Source(name="s", path="s", format="jsonl", compression="none", size=0, mtime_ns=0),),
        runtime=Runtime(max_batch_tokens=1, threads=1),
    )


def write_vectors(root: Path, *, rows: int, dim: int, form: str, weights: int = 0) -> None:
    """Write a folder of random unit vectors, one row per document, with so many lexical weights each."""
    draw = np.random.default_rng(dim)
    outputs: tuple[Output, ...] = ("dense", "sparse") if weights else ("dense",)
    layout = RowForm(format=form, outputs=outputs, dim=dim, vocabulary=VOCABULARY)  # type: ignore[arg-type]
    with open_run_folder(root) as folder:
        folder.write_run(make_run(dim, outputs=outputs))
        for index, first in enumerate(range(0, rows, SHARD_ROWS)):
            count = min(SHARD_ROWS, rows - first)
            dense = draw.standard_normal((count, dim), np.float32)
            dense = (dense / np.linalg.norm(dense, axis=1, keepdims=True)).astype(np.float16)
            sparse = draw_weights(draw, count, weights) if weights else None
            made = Embeddings(rows=np.arange(count), dense_vecs=dense, lexical_weights=sparse, colbert_vecs=None)
            write_shard(folder, layout, *make_rows(index, count, tokens=2), [made])
        folder.write_manifest(index + 1)


def draw_weights(draw: np.random.Generator, count: int, weights: int) -> LexicalWeights:
    """Return so many random lexical weights for each of `count` rows."""
    steps = draw.integers(1, VOCABULARY // weights, (count, weights))
    return LexicalWeights(
        indptr=np.arange(count + 1, dtype=np.int64) * weights,
        indices=steps.cumsum(1).astype(np.uint32).reshape(-1),
        values=draw.uniform(0.01, 0.4, count * weights).astype(np.float32),
    )


def iter_dense(root: Path) -> Iterator[NDArray[np.float32]]:
    """Yield the dense vectors of a folder, part by part."""
    for part in iter_parts(open_folder(root), outputs=("dense",), columns=()):
        yield np.asarray(part.embeddings.dense_vecs, np.float32)


def search_dense(root: Path, queries: NDArray[np.float32], *, top_k: int) -> NDArray[np.float32]:
    """Search a folder as `m3 search --mode dense` does and return the scores, [queries, top_k]."""
    target = Target(folder=open_folder(root), vocabulary=VOCABULARY, device="cpu", top_k=top_k, chunks=False)
    asked = Embeddings(rows=np.arange(len(queries)), dense_vecs=queries, lexical_weights=None, colbert_vecs=None)
    return np.asarray(search_single(target, asked, "dense").ranked.score).reshape(len(queries), -1)

"""Folders written without a model: texts, weights and matrices as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from m3cli.config import CheckpointConfig, ColbertForm, EncodeConfig, Format, RunConfig, Runtime
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
from m3cli.store.folder import open_run_folder
from m3cli.store.layout import RowForm

DIM = 16
VOCABULARY = 250_002
KEPT = pa.schema([("lang", pa.string()), ("year", pa.int64()), ("tags", pa.list_(pa.string()))])


@dataclass(frozen=True)
class Doc:
    """A document: so many chunks, each with so many weights and ColBERT vectors."""

    id: str
    text: str = "some text"
    chunks: int = 1
    weights: int = 5
    vectors: int = 3
    kept: dict[str, Any] = field(default_factory=lambda: {"lang": "de", "year": 2001, "tags": ["a", "b"]})

    @property
    def seed(self) -> int:
        """Vectors depend on the text alone, as a model's do."""
        return xxhash.xxh3_64_intdigest(self.text.encode()) & 0xFFFFFFFF


def write_folder(
    root: Path,
    shards: Sequence[Sequence[Doc]],
    *,
    outputs: tuple[Output, ...] = ("dense", "sparse", "colbert"),
    dim: int = DIM,
    format: Format = "parquet",  # noqa: A002  the flag's name
    colbert_dtype: Literal["float16", "int8", "binary"] = "float16",
    keep_text: bool = True,
    kept: pa.Schema | None = KEPT,
    finish: bool = True,
) -> Path:
    """Write a folder of these documents."""
    form = RowForm(
        format=format,
        outputs=outputs,
        dim=dim,
        vocabulary=VOCABULARY,
        keep_text=keep_text,
        kept=kept,
        colbert=ColbertForm(dtype=colbert_dtype),
        exact_vectors=False,
    )
    with open_run_folder(root) as folder:
        names = () if kept is None else tuple(kept.names)
        folder.write_run(make_run(form, kept=names))
        for index, documents in enumerate(shards):
            text = _make_text(index, documents, kept)
            chunks = _make_chunks(documents)
            with folder.open_shard(form=form, text=text, chunks=chunks, source="corpus.jsonl") as writer:
                writer.append(make_embeddings(documents, form))
                folder.commit(writer.finish())
        if finish:
            folder.write_manifest(len(shards))
    return root


def make_run(form: RowForm, *, kept: tuple[str, ...] = ()) -> RunConfig:
    fields = Fields(text="text", id="id", title=None, kept=kept, columns=(), header=False)
    config = EncodeConfig(
        fields=fields,
        outputs=form.outputs,
        max_length=8192,
        dtype="float32",
        shard_size=1 << 20,
        format=form.format,
        colbert_dtype=form.colbert.dtype,
        keep_text=form.keep_text,
    )
    return RunConfig(
        config=config,
        checkpoint=CheckpointConfig(
            name="made up",
            path="made up",
            revision=None,
            dim=form.dim,
            vocabulary=VOCABULARY,
            hashes={"config.json": "0"},
            tokenizer_hash="0",
        ),
        sources=(
            Source(name="corpus.jsonl", path="corpus.jsonl", format="jsonl", compression="none", size=0, mtime_ns=0),
        ),
        runtime=Runtime(max_batch_tokens=1024, threads=1),
    )


def _make_text(index: int, documents: Sequence[Doc], kept: pa.Schema | None) -> ShardText:
    table = None
    if kept is not None:
        table = pa.table({name: [doc.kept.get(name) for doc in documents] for name in kept.names}, schema=kept)
    return ShardText(
        shard=Shard(index=index, source=0, start=index, stop=index + 1),
        documents=tuple(
            Document(id=doc.id, text=doc.text, text_hash=_hash(doc.text), has_own_id=True, position=place)
            for place, doc in enumerate(documents)
        ),
        kept=table,
        skipped=(),
        input_hash=f"{index:032x}",
    )


def _hash(text: str) -> tuple[int, int]:
    digest = xxhash.xxh3_128_intdigest(text.encode())
    return digest >> 64, digest & (2**64 - 1)


def _make_chunks(documents: Sequence[Doc]) -> Chunks:
    rows = [(place, chunk, doc) for place, doc in enumerate(documents) for chunk in range(doc.chunks)]
    lengths = [max(doc.vectors + 1, 2) for _, _, doc in rows]
    return Chunks(
        input_ids=np.zeros(sum(lengths), np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        document=np.array([place for place, _, _ in rows], np.int64),
        chunk_index=np.array([chunk for _, chunk, _ in rows], np.int32),
        num_chunks=np.array([doc.chunks for _, _, doc in rows], np.int32),
        char_start=np.array([len(doc.text) * chunk // doc.chunks for _, chunk, doc in rows], np.int64),
        char_end=np.array([len(doc.text) * (chunk + 1) // doc.chunks for _, chunk, doc in rows], np.int64),
        truncated=np.zeros(len(rows), np.bool_),
        num_repeated=np.zeros(len(rows), np.int32),
    )


def make_embeddings(documents: Sequence[Doc], form: RowForm) -> Embeddings:
    rows = [(doc, np.random.default_rng(doc.seed + chunk)) for doc in documents for chunk in range(doc.chunks)]
    dense = np.array([_unit(draw, 1, form.dim)[0] for _, draw in rows], np.float16).reshape(-1, form.dim)
    indices = [np.sort(draw.choice(VOCABULARY, doc.weights, replace=False)) for doc, draw in rows]
    values = [(draw.random(doc.weights, dtype=np.float32) * np.float32(0.4) + np.float32(0.001)) for doc, draw in rows]
    matrices = [_unit(draw, doc.vectors, form.dim) for doc, draw in rows]
    vectors = np.concatenate([np.empty((0, form.dim), np.float32), *matrices])
    return Embeddings(
        rows=np.arange(len(rows)),
        dense_vecs=dense if "dense" in form.outputs else None,
        lexical_weights=LexicalWeights(
            indptr=_ends([doc.weights for doc, _ in rows]),
            indices=np.concatenate([np.empty(0, np.uint32), *indices]).astype(np.uint32),
            values=np.concatenate([np.empty(0, np.float32), *values]),
        )
        if "sparse" in form.outputs
        else None,
        colbert_vecs=_store(vectors, _ends([doc.vectors for doc, _ in rows]), form)
        if "colbert" in form.outputs
        else None,
    )


def _store(vectors: NDArray[np.float32], indptr: NDArray[np.int64], form: RowForm) -> TokenMatrices:
    if form.colbert.dtype == "float16":
        return TokenMatrices(indptr=indptr, vectors=vectors.astype(np.float16))
    if form.colbert.dtype == "binary":
        return TokenMatrices(indptr=indptr, vectors=np.packbits(vectors > 0, axis=1))
    scales = (np.abs(vectors).max(axis=1, initial=0) / 127).astype(np.float32)
    return TokenMatrices(indptr=indptr, vectors=np.rint(vectors / scales[:, None]).astype(np.int8), scales=scales)


def _unit(draw: np.random.Generator, count: int, dim: int) -> NDArray[np.float32]:
    vectors = draw.standard_normal((count, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _ends(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)

"""`m3 check --sample`: encode some rows of a folder again and compare them with the stored ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ColbertForm, RunConfig
from m3cli.encoder import device as machine
from m3cli.encoder.chunker import chunk_documents, cutting_of
from m3cli.encoder.embeddings import plan_rows, select_chunks
from m3cli.encoder.encode import BatchEncoder, FailedRow, batch_rows, pack_rows
from m3cli.encoder.model import Model, load_model
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.errors import ForeignFolder, ModelError
from m3cli.jobs.encode.pipeline import EncodedBatch, TokenisedShard, finish_windows, make_encoder
from m3cli.jobs.encode.resolve import check_same_checkpoint, check_same_tokenizer, open_checkpoint_of
from m3cli.jobs.reread import find_input, read_texts
from m3cli.records import Document, DoneEntry, Embeddings, LexicalWeights, Origins, ShardText, TokenMatrices
from m3cli.requests import CheckRequest
from m3cli.retrieval.scores import decode_vectors
from m3cli.store.layout import hashes_name, rows_name
from m3cli.store.reader import OutputFolder, iter_parts
from m3cli.store.verify.ledger import Fault

COSINE = 0.999
"minimum for a dense vector, and for the mean of a row's ColBERT vectors"
COMPRESSED_COSINE = 0.95
"minimum for binary, selected or pooled vectors: in bfloat16 one sign in a hundred depends on the batch"
COUNT_TOLERANCE = 0.05
"allowed difference of the number of selected or pooled vectors"
WEIGHT_COSINE = 0.99
WEIGHT_TOLERANCE = 0.01
BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _SampleRow:
    """A row of the folder, or encoded again."""

    document: int
    "number in the shard"
    chunk_index: int
    dense: NDArray[Any] | None
    weights: tuple[NDArray[np.uint32], NDArray[np.float32]] | None
    matrix: NDArray[np.float32] | None


def sample_rows(
    root: Path, run: RunConfig, entries: Mapping[int, DoneEntry], request: CheckRequest
) -> tuple[int, list[Fault]]:
    """Encode some rows of these shards again; return their number and the faults.

    Raises:
        CorpusError, ForeignFolder, ModelError: input or model are missing or not those of the folder.
    """
    chosen = _choose_rows(entries, number=request.sample, seed=request.seed)
    run = find_input(run, root, otherwise="check without --sample")
    checkpoint = open_checkpoint_of(request, run)
    check_same_checkpoint(run, checkpoint, out=root.name)
    tokenizer = load_tokenizer(checkpoint)
    check_same_tokenizer(run, tokenizer.serialisation_hash, out=root.name)
    machine.set_threads(run.runtime.threads)
    model = load_model(checkpoint, device=machine.resolve_device(request.device), dtype=run.config.dtype)
    faults: list[Fault] = []
    for text in read_texts(run, chosen):
        index = text.shard.index
        entry = entries[index]
        if text.input_hash != entry.input_hash:
            raise ForeignFolder(
                f"{entry.source} has changed since shard {index} of {root.name} was made from it; "
                "check without --sample, or encode the input again into another --out"
            )
        stored = _read_stored(root, run, entry, chosen[index])
        found = _compare_shard(root, text, stored, run=run, model=model, tokenizer=tokenizer)
        faults += [Fault(file=rows_name(index), shard=index, what=what, cure="redo") for what in found]
    return sum(map(len, chosen.values())), faults


def _choose_rows(entries: Mapping[int, DoneEntry], *, number: int, seed: int) -> dict[int, list[int]]:
    """Choose rows at random, with the same probability in all shards; return them by shard."""
    indices = sorted(entries)
    ends = np.cumsum([entries[index].counts.chunks for index in indices], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.sort(np.random.default_rng(seed).choice(total, min(number, total), replace=False))
    chosen: dict[int, list[int]] = {}
    for position, turn in zip(positions.tolist(), np.searchsorted(ends, positions, side="right").tolist(), strict=True):
        index = indices[turn]
        chosen.setdefault(index, []).append(position - int(ends[turn]) + entries[index].counts.chunks)
    return chosen


def _read_stored(root: Path, run: RunConfig, entry: DoneEntry, rows: list[int]) -> dict[int, _SampleRow]:
    """Read some rows of a shard."""
    folder = OutputFolder(path=root, run=run, entries={entry.shard.index: entry}, manifest=None)
    stored: dict[int, _SampleRow] = {}
    documents = -1
    for part in iter_parts(folder, columns=["chunk_index"]):
        index = part.rows.column("chunk_index").to_numpy()
        numbers = documents + np.cumsum(index == 0)
        first = int(part.embeddings.rows[0]) if len(index) else 0
        for row in rows:
            if first <= row < first + len(index):
                stored[row] = _take_row(
                    part.embeddings, row - first, int(numbers[row - first]), int(index[row - first])
                )
        if len(index):
            documents = int(numbers[-1])
    return stored


def _take_row(embeddings: Embeddings, position: int, document: int, chunk_index: int) -> _SampleRow:
    dense, weights, matrices = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    return _SampleRow(
        document=document,
        chunk_index=chunk_index,
        dense=None if dense is None else dense[position].copy(),
        weights=None if weights is None else _take_weights(weights, position),
        matrix=None if matrices is None else _take_matrix(matrices, position),
    )


def _take_matrix(matrices: TokenMatrices, position: int) -> NDArray[np.float32]:
    return decode_vectors(matrices, slice(matrices.indptr[position], matrices.indptr[position + 1])).copy()


def _take_weights(weights: LexicalWeights, position: int) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    span = slice(weights.indptr[position], weights.indptr[position + 1])
    return weights.indices[span].copy(), weights.values[span].copy()


def _compare_shard(
    root: Path,
    text: ShardText,
    stored: Mapping[int, _SampleRow],
    *,
    run: RunConfig,
    model: Model,
    tokenizer: Tokenizer,
) -> Iterator[str]:
    """Encode some rows of a shard again; yield the differences."""
    config = run.config
    documents, row_documents = _find_documents(root, text, stored)
    for row in stored.keys() - row_documents.keys():
        yield f"row {row:,}: the input has no document with the hash of its text"
    chunks = chunk_documents(documents, tokenizer, cutting_of(config))
    pairs = {row: (document, stored[row].chunk_index) for row, document in row_documents.items()}
    if not config.merges:
        wanted = set(pairs.values())
        cut = zip(chunks.document.tolist(), chunks.chunk_index.tolist(), strict=True)
        chunks = select_chunks(chunks, np.array([chunk for chunk, pair in enumerate(cut) if pair in wanted], np.int64))
    none = np.empty(0, np.int64)
    rows = plan_rows(chunks, long_docs=config.long_docs, taken=none)
    cut = zip(rows.document.tolist(), rows.chunk_index.tolist(), strict=True)
    positions = {pair: position for position, pair in enumerate(cut)}
    for row, pair in pairs.items():
        if pair not in positions:
            yield f"row {row:,}: its document has no chunk {pair[1]} when it is chunked again"
    form = config.colbert_form
    shard = TokenisedShard(text=text, chunks=chunks, origins=Origins(rows=none, shard=none, row=none))
    encoded = dict(_encode_rows(shard, run=run, model=model, tokenizer=tokenizer))
    for row, pair in pairs.items():
        if pair in positions:
            yield from (f"row {row:,}: {what}" for what in _compare_row(stored[row], encoded[positions[pair]], form))


def _find_documents(
    root: Path, text: ShardText, stored: Mapping[int, _SampleRow]
) -> tuple[list[Document], dict[int, int]]:
    """Return the documents of some rows, and the index of each row's document."""
    hashes = np.load(root / hashes_name(text.shard.index))
    by_hash = {document.text_hash: document for document in text.documents}
    numbers: dict[tuple[int, int], int] = {}
    row_documents: dict[int, int] = {}
    for row, kept in stored.items():
        text_hash = tuple(hashes[kept.document].tolist())
        if text_hash in by_hash:
            row_documents[row] = numbers.setdefault(text_hash, len(numbers))
    return [by_hash[text_hash] for text_hash in numbers], row_documents


def _encode_rows(
    shard: TokenisedShard, *, run: RunConfig, model: Model, tokenizer: Tokenizer
) -> Iterator[tuple[int, _SampleRow]]:
    """Encode the rows of a shard, and merge them as in the folder."""
    encoder = make_encoder(model, tokenizer, config=run.config)
    batches = (
        _encode_batch(shard, positions, encoder)
        for positions in batch_rows(shard.chunks.num_tokens, max_batch_tokens=BATCH_TOKENS)
    )
    for window in finish_windows(shard, chain.from_iterable(batches), config=run.config):
        for position, row in enumerate(window.rows.tolist()):
            yield row, _take_row(window, position, document=0, chunk_index=0)


def _encode_batch(shard: TokenisedShard, rows: NDArray[np.int64], encoder: BatchEncoder) -> Iterator[EncodedBatch]:
    for result in encoder.encode(pack_rows(shard.chunks, rows)):
        if isinstance(result, FailedRow):
            raise ModelError(f"{result.reason}: {result.detail}")
        yield EncodedBatch(shard=shard, start=0, stop=shard.chunks.num_rows, embeddings=result)


def _compare_row(stored: _SampleRow, encoded: _SampleRow, form: ColbertForm) -> Iterator[str]:
    """Yield the differences of a stored row and the same row encoded again."""
    if stored.dense is not None and encoded.dense is not None:
        cosine = _cosines(stored.dense[None], encoded.dense[None])[0]
        if not cosine >= COSINE:
            yield f"encoded again, its dense vector has cosine {cosine:.4f} with the stored one"
    if (
        stored.weights is not None
        and encoded.weights is not None
        and (what := _compare_weights(stored.weights, encoded.weights))
    ):
        yield what
    if stored.matrix is not None and encoded.matrix is not None:
        yield from _compare_matrices(stored.matrix, encoded.matrix, form)


def _compare_matrices(stored: NDArray[np.float32], encoded: NDArray[np.float32], form: ColbertForm) -> Iterator[str]:
    """Compare the ColBERT vectors of a row with those encoded again.

    Rounding may change which tokens are selected or pooled. Each stored vector is then compared with the most similar
    new one, and the numbers of vectors may differ.
    """
    exact = form.pool == 1 and not form.by_weight
    if abs(len(stored) - len(encoded)) > (0 if exact else max(1, int(COUNT_TOLERANCE * len(encoded)))):
        yield f"encoded again, it has {len(encoded):,} ColBERT vectors, {len(stored):,} are stored"
        return
    if not len(stored):
        return
    cosine = (_cosines(stored, encoded) if exact else (stored @ encoded.T).max(axis=1)).mean()
    if not cosine >= (COSINE if exact and form.dtype != "binary" else COMPRESSED_COSINE):
        yield f"encoded again, its ColBERT vectors have cosine {cosine:.4f} with the stored ones"


def _compare_weights(stored: tuple[NDArray[Any], NDArray[Any]], again: tuple[NDArray[Any], NDArray[Any]]) -> str | None:
    ids = np.union1d(stored[0], again[0])
    both = np.zeros((2, len(ids)), np.float32)
    for line, (indices, values) in zip(both, (stored, again), strict=True):
        line[np.searchsorted(ids, indices)] = values
    if not len(ids) or np.abs(both[0] - both[1]).max() <= WEIGHT_TOLERANCE:
        return None
    cosine = _cosines(both[:1], both[1:])[0]
    return None if cosine >= WEIGHT_COSINE else f"encoded again, its lexical weights have cosine {cosine:.4f}"


def _cosines(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float32]:
    left, right = left.astype(np.float32), right.astype(np.float32)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float32] = np.einsum("ij,ij->i", left, right) / np.maximum(norms, 1e-12)
    return cosines

"""`m3 check`: a folder read back, all that is wrong with it listed, and if asked for taken away.

    ledger -> strays            what the folder says of itself, what lies there beside it
    files                       a thread that hashes one shard ahead
    contents                    this thread, of shards whose files are as they were written
    sample                      some rows encoded again from the input (`--sample`, the only part that needs a model)
    repair                      under the folder's lock, which a plain check does not take

The exit code describes the folder as it is left: 12 damage, 75 work is left, 3 complete but rows were skipped, 0 fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.concurrency import prefetch
from m3cli.config import ColbertForm, EncodeRequest, RunConfig
from m3cli.encoder import device as machine
from m3cli.encoder.batcher import batch_rows, pack_rows
from m3cli.encoder.chunker import chunk_documents, cutting_of
from m3cli.encoder.embeddings import select_chunks
from m3cli.encoder.encode import BatchEncoder, FailedRow
from m3cli.encoder.merge import plan_rows
from m3cli.encoder.model import Model, load_model
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.errors import (
    EXIT_DONE,
    EXIT_ROWS_SKIPPED,
    DamageFound,
    ForeignFolder,
    ModelError,
    OutputError,
    Stopped,
    UsageError,
    check_reachable,
)
from m3cli.jobs.encode.pipeline import EncodedBatch, TokenisedShard, finish_windows, make_encoder
from m3cli.jobs.encode.resolve import check_same_checkpoint, check_same_tokenizer, make_form, open_checkpoint
from m3cli.jobs.reread import find_input, read_texts
from m3cli.progress import FileMeter
from m3cli.records import Document, DoneEntry, Embeddings, LexicalWeights, Origins, ShardText, TokenMatrices
from m3cli.requests import CheckRequest
from m3cli.retrieval.scores import decode_vectors
from m3cli.store.documents import find_links, is_ours
from m3cli.store.layout import RUN_NAME, hashes_name, rows_name, shard_of
from m3cli.store.lock import hold_lock
from m3cli.store.reader import OutputFolder, iter_parts
from m3cli.store.verify.contents import Expected, check_contents
from m3cli.store.verify.ledger import Fault, Ledger, check_files, read_ledger
from m3cli.store.verify.listing import find_strays, find_unknown, repair, shards_to_redo
from m3cli.store.verify.rows import DuplicateIds, find_duplicate_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCheck:
    """What `m3 check` found, and did."""

    folder: str
    complete: bool
    "every shard is done, and the manifest is there and true"
    num_shards: int
    "done"
    documents: int
    rows: int
    skipped: int
    bytes: int
    "of all files that done entries name"
    faults: tuple[Fault, ...]
    redo: tuple[int, ...]
    "shards that are to be done again"
    duplicate_ids: DuplicateIds
    sampled: int
    "rows that were encoded again and compared"
    unknown: tuple[str, ...]
    "files and folders among m3's that it does not write; they are no damage, and --repair leaves them"
    removed: tuple[str, ...]
    "files that --repair removed"
    exit_code: int


def check_folder(request: CheckRequest, *, meter: FileMeter) -> FolderCheck:
    """Check a folder, and repair it if asked to."""
    root = Path(request.folder).absolute()
    check_reachable(root / "_m3", OutputError)
    if not root.is_dir():
        raise UsageError(f"{request.folder}: no such folder")
    if not is_ours(root):
        raise UsageError(f"{request.folder} is not an m3 folder: it has no _m3/run.json")
    if request.repair and any(shard_of(name) is None for name in find_links(root)):
        request = replace(request, repair=False)  # the lock is a file below, too: nothing is written through links
    with hold_lock(root, worker=0, num_workers=1) if request.repair else nullcontext():
        return _check(root, request, meter=meter)


def _check(root: Path, request: CheckRequest, *, meter: FileMeter) -> FolderCheck:
    ledger = read_ledger(root)
    faults = [*ledger.faults, *find_strays(root, ledger)]
    run = ledger.run
    found, hashes = _check_shards(root, ledger, run, meter=meter)
    faults += found
    sampled = 0
    if request.sample:
        if run is None:
            raise DamageFound(f"{root / RUN_NAME} is missing or damaged: it says what --sample would have to encode")
        sound = {index: entry for index, entry in ledger.entries.items() if index not in shards_to_redo(faults)}
        sampled, found = sample_rows(root, run, sound, request)
        faults += found
    duplicate_ids = find_duplicate_ids(root, hashes)
    removed = tuple(repair(root, faults)) if request.repair else ()
    counts = ledger.counts
    return FolderCheck(
        folder=request.folder,
        complete=ledger.manifest is not None and not faults,
        num_shards=len(ledger.entries),
        documents=counts.documents,
        rows=counts.chunks,
        skipped=counts.skipped,
        bytes=_count_bytes(ledger),
        faults=tuple(faults),
        redo=tuple(shards_to_redo(faults)),
        duplicate_ids=duplicate_ids,
        sampled=sampled,
        unknown=tuple(name for name in find_unknown(root) if name not in {fault.file for fault in faults}),
        removed=removed,
        exit_code=_judge(ledger, faults, repaired=request.repair),
    )


def _check_shards(
    root: Path, ledger: Ledger, run: RunConfig | None, *, meter: FileMeter
) -> tuple[list[Fault], dict[int, NDArray[np.int64]]]:
    """Check every shard; return the faults, and the hashed ids of each shard that has none."""
    expected = _expect(run) if run else None
    faults: list[Fault] = []
    hashes: dict[int, NDArray[np.int64]] = {}
    meter.start(_count_bytes(ledger))
    shards = prefetch(_hash_shards(root, ledger), depth=1, name="hashing")
    try:
        for entry, damaged in shards:
            faults += damaged
            if not damaged and expected is not None:
                check = check_contents(root, entry, expected)
                faults += check.faults
                if not check.faults:
                    hashes[entry.shard.index] = np.concatenate([np.empty(0, np.int64), *check.id_hashes])
            meter.advance(sum(record.length for record in entry.files))
    finally:
        shards.close()
        meter.stop()
    return faults, hashes


def _hash_shards(root: Path, ledger: Ledger) -> Iterator[tuple[DoneEntry, list[Fault]]]:
    for index in sorted(ledger.entries):
        yield ledger.entries[index], check_files(root, ledger.entries[index])


def _expect(run: RunConfig) -> Expected:
    config = run.config
    merged = config.long_docs == "merge"
    return Expected(
        form=make_form(run, kept=False), kept=config.fields.kept, max_length=config.max_length, merged=merged
    )


def _count_bytes(ledger: Ledger) -> int:
    return sum(record.length for entry in ledger.entries.values() for record in entry.files)


def _judge(ledger: Ledger, faults: list[Fault], *, repaired: bool) -> int:
    left = [fault for fault in faults if fault.cure == "none"] if repaired else faults
    if left:
        return DamageFound.exit_code
    dropped = any(fault.cure in ("redo", "manifest") for fault in faults)
    if ledger.manifest is None or dropped:
        return Stopped.exit_code
    return EXIT_ROWS_SKIPPED if ledger.counts.skipped else EXIT_DONE


COSINE = 0.999
"at least, of a dense vector, and of a row's ColBERT vectors on average"
COMPRESSED_COSINE = 0.95
"at least, where vectors are signs, chosen or pooled: one sign in a hundred may turn from batch to batch in bfloat16"
COUNT_TOLERANCE = 0.05
"part of the vectors that may be more or fewer where they are chosen or pooled"
WEIGHT_COSINE = 0.99
WEIGHT_TOLERANCE = 0.01
BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredRow:
    """A row as it lies in the folder."""

    document: int
    "its number in the shard"
    chunk_index: int
    dense: NDArray[Any] | None
    weights: tuple[NDArray[np.uint32], NDArray[np.float32]] | None
    matrix: NDArray[np.float32] | None


def sample_rows(
    root: Path, run: RunConfig, entries: Mapping[int, DoneEntry], request: CheckRequest
) -> tuple[int, list[Fault]]:
    """Encode some rows of the given shards again; return how many, and the faults.

    Raises:
        CorpusError, ForeignFolder, ModelError: input or model are gone, or others than the folder's.
    """
    chosen = _choose_rows(entries, number=request.sample, seed=request.seed)
    run = find_input(run, root, otherwise="check without --sample")
    asked = EncodeRequest(inputs=(), model=request.model, revision=request.revision)
    checkpoint = open_checkpoint(asked)
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
                "check without --sample, or encode what it is now into another --out"
            )
        stored = _read_stored(root, run, entry, chosen[index])
        found = _compare_shard(root, text, stored, run=run, model=model, tokenizer=tokenizer)
        faults += [Fault(file=rows_name(index), shard=index, what=what, cure="redo") for what in found]
    return sum(map(len, chosen.values())), faults


def _choose_rows(entries: Mapping[int, DoneEntry], *, number: int, seed: int) -> dict[int, list[int]]:
    """Choose rows of all shards alike, by shard."""
    indices = sorted(entries)
    ends = np.cumsum([entries[index].counts.chunks for index in indices], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    places = np.sort(np.random.default_rng(seed).choice(total, min(number, total), replace=False))
    chosen: dict[int, list[int]] = {}
    for place, position in zip(places.tolist(), np.searchsorted(ends, places, side="right").tolist(), strict=True):
        index = indices[position]
        chosen.setdefault(index, []).append(place - int(ends[position]) + entries[index].counts.chunks)
    return chosen


def _read_stored(root: Path, run: RunConfig, entry: DoneEntry, rows: list[int]) -> dict[int, _StoredRow]:
    """Read some rows of a shard, a row group at a time."""
    folder = OutputFolder(path=root, run=run, entries={entry.shard.index: entry}, manifest=None)
    stored: dict[int, _StoredRow] = {}
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


def _take_row(embeddings: Embeddings, place: int, document: int, chunk_index: int) -> _StoredRow:
    dense, weights, matrices = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    return _StoredRow(
        document=document,
        chunk_index=chunk_index,
        dense=None if dense is None else dense[place].copy(),
        weights=None if weights is None else _take_weights(weights, place),
        matrix=None if matrices is None else _take_matrix(matrices, place),
    )


def _take_matrix(matrices: TokenMatrices, place: int) -> NDArray[np.float32]:
    return decode_vectors(matrices, slice(matrices.indptr[place], matrices.indptr[place + 1])).copy()


def _take_weights(weights: LexicalWeights, place: int) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    run = slice(weights.indptr[place], weights.indptr[place + 1])
    return weights.indices[run].copy(), weights.values[run].copy()


def _compare_shard(
    root: Path, text: ShardText, stored: Mapping[int, _StoredRow], *, run: RunConfig, model: Model, tokenizer: Tokenizer
) -> Iterator[str]:
    """Encode some rows of a shard again, and say which are others."""
    config = run.config
    documents, row_documents = _find_documents(root, text, stored)
    for row in stored.keys() - row_documents.keys():
        yield f"row {row:,}: the input has no document of its text's hash"
    chunks = chunk_documents(documents, tokenizer, cutting_of(config))
    pairs = {row: (document, stored[row].chunk_index) for row, document in row_documents.items()}
    if not config.merges:
        wanted = set(pairs.values())
        cut = zip(chunks.document.tolist(), chunks.chunk_index.tolist(), strict=True)
        chunks = select_chunks(chunks, np.array([place for place, pair in enumerate(cut) if pair in wanted], np.int64))
    none = np.empty(0, np.int64)
    rows = plan_rows(chunks, long_docs=config.long_docs, taken=none)
    cut = zip(rows.document.tolist(), rows.chunk_index.tolist(), strict=True)
    places = {pair: place for place, pair in enumerate(cut)}
    for row, pair in pairs.items():
        if pair not in places:
            yield f"row {row:,}: its document has no chunk {pair[1]} when it is cut again"
    form = config.colbert_form
    shard = TokenisedShard(text=text, chunks=chunks, origins=Origins(rows=none, shard=none, row=none))
    made = dict(_encode_rows(shard, run=run, model=model, tokenizer=tokenizer))
    for row, pair in pairs.items():
        if pair in places:
            yield from (f"row {row:,}: {what}" for what in _compare_row(stored[row], made[places[pair]], form))


def _find_documents(
    root: Path, text: ShardText, stored: Mapping[int, _StoredRow]
) -> tuple[list[Document], dict[int, int]]:
    """Find the documents of some rows in the input; return them, and which of them each row is of."""
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
) -> Iterator[tuple[int, _StoredRow]]:
    """Encode a shard's rows, and merge them where the folder has them merged."""
    encoder = make_encoder(model, tokenizer, config=run.config)
    batches = (
        _encode_batch(shard, places, encoder)
        for places in batch_rows(shard.chunks.num_tokens, max_batch_tokens=BATCH_TOKENS)
    )
    for window in finish_windows(shard, chain.from_iterable(batches), config=run.config):
        for place, row in enumerate(window.rows.tolist()):
            yield row, _take_row(window, place, document=0, chunk_index=0)


def _encode_batch(shard: TokenisedShard, rows: NDArray[np.int64], encoder: BatchEncoder) -> Iterator[EncodedBatch]:
    for made in encoder.encode(pack_rows(shard.chunks, rows)):
        if isinstance(made, FailedRow):
            raise ModelError(f"{made.reason}: {made.detail}")
        yield EncodedBatch(shard=shard, start=0, stop=shard.chunks.num_rows, embeddings=made)


def _compare_row(stored: _StoredRow, made: _StoredRow, form: ColbertForm) -> Iterator[str]:
    """Say in what a stored row is another than the one just made."""
    if stored.dense is not None and made.dense is not None:
        cosine = _cosines(stored.dense[None], made.dense[None])[0]
        if not cosine >= COSINE:
            yield f"encoded again, its dense vector has cosine {cosine:.4f} with the stored one"
    if (
        stored.weights is not None
        and made.weights is not None
        and (what := _compare_weights(stored.weights, made.weights))
    ):
        yield what
    if stored.matrix is not None and made.matrix is not None:
        yield from _compare_matrices(stored.matrix, made.matrix, form)


def _compare_matrices(stored: NDArray[np.float32], made: NDArray[np.float32], form: ColbertForm) -> Iterator[str]:
    """Hold the vectors of a row against those just made.

    Where tokens are chosen or pooled, the last bits of a number may decide which: then each stored vector is held
    against the one just made that is most like it, and some may be more or fewer.
    """
    exact = form.pool == 1 and not form.by_weight
    if abs(len(stored) - len(made)) > (0 if exact else max(1, int(COUNT_TOLERANCE * len(made)))):
        yield f"encoded again, it has {len(made):,} ColBERT vectors, {len(stored):,} are stored"
        return
    if not len(stored):
        return
    cosine = (_cosines(stored, made) if exact else (stored @ made.T).max(axis=1)).mean()
    if not cosine >= (COSINE if exact and form.dtype != "binary" else COMPRESSED_COSINE):
        yield f"encoded again, its ColBERT vectors have cosine {cosine:.4f} with the stored ones"


def _compare_weights(stored: tuple[NDArray[Any], NDArray[Any]], made: tuple[NDArray[Any], NDArray[Any]]) -> str | None:
    ids = np.union1d(stored[0], made[0])
    both = np.zeros((2, len(ids)), np.float32)
    for line, (indices, values) in zip(both, (stored, made), strict=True):
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

"""Windows and packed batches of a shard's rows, and their way through the model.

A *window* is a range of consecutive rows whose ColBERT matrices fit in memory together. Rows are sorted by length
inside a window and leave it in corpus order, so the writer only appends. Without ColBERT a shard is one window. Windows
and batches are a function of row lengths and budgets only.

A batch is launched, which queues its work on the device, and collected later. On CUDA the next batches are launched
before a batch is collected, so the device is busy while the host handles results. On a CPU a launch does all the work.
There several threads each encode a batch, with a share of the cores.

A batch is halved if memory runs out. Rows whose output is not finite are encoded again in dtypes with more range: of
float16 on CUDA in bfloat16, then all in float32. A row that fails in each is returned as `FailedRow` with its reason,
not raised.

`TextEncoder` gives single texts in float32: queries, passages of pairs; it cuts no text into chunks.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.config import Dtype
from m3cli.encoder import device as machine
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.device import AHEAD, Fetched, fetch, lacks_memory, open_stream
from m3cli.encoder.embeddings import concat_embeddings, select_rows
from m3cli.encoder.heads import NO_LENGTH, NOT_FINITE, OutputOptions, build_embeddings, run_heads
from m3cli.encoder.model import Model, load_model, load_retries, pool_as_cls, run_model, run_with_added
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.errors import ModelError, ModelTooLarge, UsageError
from m3cli.records import Batch, Chunks, Embeddings, Output, concat_ranges

WINDOW_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"ColBERT bytes of a window by device kind; fixed, because the bytes of a folder depend on it"
BALANCE_STEP = 128
"tokens; budgets of equal batches are multiples of it, as batches are padded to one (TOKEN_STEP in model.py)"
BALANCE_TRIES = 32

WARM_UP_LENGTH = 256
"tokens of a row"

NOT_A_NUMBER = "not a number in the output"
OUT_OF_MEMORY = "out of memory"
ERRORS = ("", "NaN or infinity", "a vector of length 0")
"by the numbers in heads.py"

_log = logging.getLogger(__name__)


def plan_windows(num_tokens: NDArray[np.int64], *, max_window_tokens: int | None) -> list[tuple[int, int]]:
    """Return ranges [start, stop) of rows of at most `max_window_tokens`; a longer row is a range of its own."""
    num_rows = len(num_tokens)
    if num_rows == 0:
        return []
    if max_window_tokens is None:
        return [(0, num_rows)]
    ends = np.cumsum(num_tokens)
    windows: list[tuple[int, int]] = []
    start, used = 0, 0
    while start < num_rows:
        stop = max(start + 1, int(np.searchsorted(ends, used + max_window_tokens, side="right")))
        windows.append((start, stop))
        start, used = stop, int(ends[stop - 1])
    return windows


def batch_rows(num_tokens: NDArray[np.int64], *, max_batch_tokens: int, threads: int = 1) -> list[NDArray[np.int64]]:
    """Group rows, longest first, into batches of at most `max_batch_tokens`; a longer row is a batch of its own.

    For several threads, batches have nearly equal token counts, and their number is a multiple of the threads as far as
    rows allow. Otherwise threads would be idle during the last batch.

    Returns:
        row numbers, each exactly once, by descending length; equal lengths keep their order.
    """
    order = np.argsort(-num_tokens, kind="stable")
    lengths = num_tokens[order]
    ranges = plan_windows(lengths, max_window_tokens=max_batch_tokens)
    if threads > 1 and ranges:
        limit = -(-len(ranges) // threads) * threads
        step = max(BALANCE_STEP, max_batch_tokens // BALANCE_TRIES // BALANCE_STEP * BALANCE_STEP)
        min_tokens = -(-int(lengths.sum()) // limit // BALANCE_STEP) * BALANCE_STEP
        for budget in range(min_tokens, max_batch_tokens, step):
            balanced = plan_windows(lengths, max_window_tokens=budget)
            if len(balanced) <= limit:
                ranges = balanced
                break
    return [order[start:stop] for start, stop in ranges]


def pack_rows(chunks: Chunks, rows: NDArray[np.int64]) -> Batch:
    """Return some rows of a shard as one batch."""
    return _gather(chunks, rows, rows=rows)


def split_batch(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch of two or more rows into two of nearly equal token counts, in the same order."""
    middle = int(np.searchsorted(batch.cu_seqlens, batch.cu_seqlens[-1] / 2))
    middle = min(max(middle, 1), len(batch.rows) - 1)
    return slice_batch(batch, 0, middle), slice_batch(batch, middle, len(batch.rows))


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Return the rows [start, stop) of a batch."""
    cu_seqlens = batch.cu_seqlens[start : stop + 1]
    return Batch(
        rows=batch.rows[start:stop],
        input_ids=batch.input_ids[cu_seqlens[0] : cu_seqlens[-1]],
        cu_seqlens=cu_seqlens - cu_seqlens[0],
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )


def take_batch(batch: Batch, indices: NDArray[np.int64]) -> Batch:
    """Return some rows of a batch."""
    return _gather(batch, indices, rows=batch.rows[indices])


def _gather(packed: Chunks | Batch, indices: NDArray[np.int64], *, rows: NDArray[np.int64]) -> Batch:
    """Return the sequences at `indices` as a batch with the numbers `rows`."""
    lengths = np.diff(packed.cu_seqlens)[indices]
    cu_seqlens, tokens = concat_ranges(packed.cu_seqlens[indices], lengths)
    return Batch(
        rows=rows,
        input_ids=packed.input_ids[tokens].astype(np.int64, copy=False),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(lengths.max()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    """A row that the model cannot encode, and why."""

    row: int
    "index in the shard"
    reason: str
    detail: str


ParallelMap = Callable[..., Generator["_BatchResult | None"]]
"m3cli.concurrency.parallel_map"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """A batch whose work is queued on the device."""

    batch: Batch
    outputs: Fetched
    "of `run_heads`"


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchResult:
    """The embeddings of a batch and their errors."""

    batch: Batch
    embeddings: Embeddings
    errors: NDArray[np.uint8]
    "[B] error of each row, an index of ERRORS; 0: none"


class BatchEncoder:
    """A loaded model with its options, and the largest batch that memory has held.

    Args:
        model: on its device.
        options: of the heads.
        mcls: text tokens for each `<s>`; 0: a row has one.
        retries: load the model in other dtypes, one after the other, for rows that are not finite (`load_retries`).
        num_threads: batches at once, by `parallel_map`.
        parallel_map: `m3cli.concurrency.parallel_map`, needed for several threads.
        ahead: batches that are launched before the first of them is collected; None: as `AHEAD` says.
    """

    def __init__(
        self,
        model: Model,
        options: OutputOptions,
        *,
        mcls: int = 0,
        retries: Sequence[Callable[[], Model]] = (),
        num_threads: int = 1,
        parallel_map: ParallelMap | None = None,
        ahead: int | None = None,
    ) -> None:
        self.model = model
        self.mcls = mcls
        self.num_threads = num_threads
        self.max_tokens: int | None = None
        "of a batch of several rows; None until memory has run out"
        self._ahead = AHEAD[model.device.type] if ahead is None else ahead
        self._options = options
        self._parallel_map = parallel_map
        self.repeated: Counter[str] = Counter()
        "rows that were encoded again, by the dtype in which they are finite"
        self._retries = retries
        self._retry_alone = model.device.type == "cpu"
        "where a row alone is as fast, and the last bits of its vectors depend on its batch"
        self._loaded: list[Model] = []
        "models of the first retries"
        self._stream = open_stream(model.device)

    def warm_up(self, num_tokens: int) -> None:
        """Run a batch of `num_tokens` tokens on CUDA, which allocates memory, imports and chooses kernels.

        If memory does not hold it, `max_tokens` is set before a row is read.
        """
        if self.model.device.type != "cuda":
            return
        length = min(WARM_UP_LENGTH, num_tokens, self.model.checkpoint.max_length)
        cu_seqlens = np.arange(0, num_tokens + 1, length, dtype=np.int32)
        ids = np.arange(cu_seqlens[-1], dtype=np.int64) % self.model.checkpoint.vocab_size
        batch = Batch(rows=np.arange(len(cu_seqlens) - 1), input_ids=ids, cu_seqlens=cu_seqlens, max_seqlen=length)
        while (launched := self._launch(self.model, batch)) is None and len(batch.rows) > 1:
            self._reduce_batch_limit(batch)
            batch, _ = split_batch(batch)
        if launched is not None:
            launched.outputs.wait()

    def encode(self, batch: Batch) -> Iterator[Embeddings | FailedRow]:
        """Yield a batch's rows in order, in parts if memory does not hold the batch."""
        return self.encode_all((batch,))

    def encode_all(self, batches: Iterable[Batch]) -> Iterator[Embeddings | FailedRow]:
        """Yield the rows of batches in order, as `encode` does; the device goes on with the next batches meanwhile."""
        return self._encode_in_threads(batches) if self.num_threads > 1 else self._encode_in_turn(batches)

    def _encode_in_threads(self, batches: Iterable[Batch]) -> Iterator[Embeddings | FailedRow]:
        assert self._parallel_map is not None
        source, started = iter(batches), deque[Batch]()
        too_large: Batch | None = None
        while True:
            remaining, too_large = chain(tuple(started), source), None
            started.clear()
            queue = self._fit(remaining, started)
            with closing(self._parallel_map(self._run, queue, threads=self.num_threads, name="encoding")) as results:
                for result in results:
                    batch = started.popleft()
                    if result is None:
                        too_large = batch
                        break
                    yield from self._repair(result)
            if too_large is None:
                return
            # The other threads have ended, and their memory is free.
            yield from self._encode_in_turn((too_large,))

    def _fit(self, batches: Iterable[Batch], started: deque[Batch] | None = None) -> Iterator[Batch]:
        """Yield batches that memory can hold, larger ones in halves, and append them to `started`."""
        for batch in batches:
            if len(batch.rows) > 1 and self.max_tokens is not None and len(batch.input_ids) > self.max_tokens:
                yield from self._fit(split_batch(batch), started)
            else:
                if started is not None:
                    started.append(batch)
                yield batch

    def _run(self, batch: Batch) -> _BatchResult | None:
        """Return the result of a batch; None: memory ran out."""
        launched = self._launch(self.model, batch)
        return None if launched is None else _collect(launched)

    def _encode_in_turn(self, batches: Iterable[Batch]) -> Iterator[Embeddings | FailedRow]:
        waiting = deque[_Launched]()
        yield from self._encode_ahead(batches, waiting)
        yield from self._collect_all(waiting)

    def _encode_ahead(self, batches: Iterable[Batch], waiting: deque[_Launched]) -> Iterator[Embeddings | FailedRow]:
        """Yield rows as `_encode_in_turn` does, but leave the last batches in `waiting`, to be collected later."""
        for batch in self._fit(batches):
            launched = self._launch(self.model, batch)
            if launched is None and waiting:
                yield from self._collect_all(waiting)  # launched batches hold memory too
                launched = self._launch(self.model, batch)
            if launched is not None:
                waiting.append(launched)
                del launched  # frees its outputs before the next launch
                yield from self._collect_all(waiting, but=self._ahead)
            elif len(batch.rows) == 1:
                torch.cuda.empty_cache()
                yield _lacks_memory(batch, self.model.dtype, self.model.device)
            else:
                self._reduce_batch_limit(batch)
                yield from self._encode_ahead((batch,), waiting)  # now in halves

    def _reduce_batch_limit(self, batch: Batch) -> None:
        torch.cuda.empty_cache()
        # Both halves are tried, also the larger one.
        self.max_tokens = max(len(half.input_ids) for half in split_batch(batch))
        _log.warning(
            "out of memory with a batch of %d tokens; from here on batches have at most %d",
            len(batch.input_ids),
            self.max_tokens,
        )

    def _launch(self, model: Model, batch: Batch) -> _Launched | None:
        """Queue a batch's work; None: memory ran out.

        The caller continues outside the error's handler, whose traceback keeps the failed batch's tensors alive.
        """
        try:
            if self.mcls:
                model = pool_as_cls(model)
                states, layout = run_with_added(model, batch, every=self.mcls)
            else:
                states, layout = run_model(model, batch)
            outputs = run_heads(model, batch, states, layout, self._options)
            return _Launched(batch=batch, outputs=fetch(outputs, self._stream))
        except (RuntimeError, MemoryError) as error:
            if lacks_memory(error):
                return None
            raise

    def _collect_all(self, waiting: deque[_Launched], *, but: int = 0) -> Iterator[Embeddings | FailedRow]:
        """Yield the rows of launched batches, first to last, except the last `but` of them."""
        while len(waiting) > but:
            collected = [_collect(waiting.popleft())]
            if collected[0].errors.any():  # launched batches hold memory that the next dtype needs
                collected += [_collect(launched) for launched in waiting]
                waiting.clear()
            for result in collected:
                yield from self._repair(result)

    def _repair(self, result: _BatchResult) -> Iterator[Embeddings | FailedRow]:
        """Yield the finite rows, and the other rows encoded again."""
        yield from _finite_rows(result)
        failed = np.flatnonzero(result.errors)
        if not len(failed):
            return
        groups = np.split(failed, len(failed)) if self._retry_alone else [failed]
        for rows in groups:
            yield from self._encode_again(take_batch(result.batch, rows), result.errors[rows])

    def _encode_again(
        self, batch: Batch, errors: NDArray[np.uint8], *, level: int = 0
    ) -> Iterator[Embeddings | FailedRow]:
        """Yield rows that were not finite before the retry number `level`, with their errors [B]."""
        if level == len(self._retries):
            tried = " and in ".join(_name(each.dtype) for each in (self.model, *self._loaded))
            for row, error in zip(batch.rows.tolist(), errors.tolist(), strict=True):
                yield FailedRow(row=row, reason=NOT_A_NUMBER, detail=f"{ERRORS[error]} in {tried}")
            return
        model = self._load(level)
        launched = None if model is None else self._launch(model, batch)
        if launched is None or model is None:
            torch.cuda.empty_cache()
            if len(batch.rows) == 1:
                yield _lacks_memory(batch, torch.float32 if model is None else model.dtype, self.model.device)
                return
            first, second = split_batch(batch)
            yield from self._encode_again(first, errors[: len(first.rows)], level=level)
            yield from self._encode_again(second, errors[len(first.rows) :], level=level)
            return
        result = _collect(launched)
        self.repeated[_name(model.dtype)] += int((result.errors == 0).sum())
        yield from _finite_rows(result)
        failed = np.flatnonzero(result.errors)
        if len(failed):
            yield from self._encode_again(take_batch(batch, failed), result.errors[failed], level=level + 1)

    def _load(self, level: int) -> Model | None:
        """Return the model of a retry, loaded before or now; None: memory does not hold it."""
        if level < len(self._loaded):
            return self._loaded[level]
        before = self._loaded[-1] if self._loaded else self.model
        try:
            model = self._retries[level]()
        except (ModelTooLarge, RuntimeError, MemoryError) as cause:
            if not lacks_memory(cause):
                raise
            return None
        _log.warning("a row is not finite in %s; encoding it again in %s", _name(before.dtype), _name(model.dtype))
        self._loaded.append(model)
        return model


def _finite_rows(result: _BatchResult) -> Iterator[Embeddings]:
    """Yield the rows of a batch without an error, if there are any."""
    good = np.flatnonzero(result.errors == 0)
    if len(good) == len(result.errors):
        yield result.embeddings
    elif len(good):
        yield select_rows(result.embeddings, good, rows=result.embeddings.rows[good])


def _collect(launched: _Launched) -> _BatchResult:
    """Wait for a batch and return its result."""
    outputs, batch = launched.outputs.wait(), launched.batch
    embeddings = build_embeddings(batch, outputs)
    return _BatchResult(batch=batch, embeddings=embeddings, errors=_find_errors(outputs, embeddings, batch))


def _find_errors(outputs: Mapping[str, NDArray[Any]], embeddings: Embeddings, batch: Batch) -> NDArray[np.uint8]:
    """Return the error of each row [B]: states or outputs that are not finite, or a zero vector."""
    errors = np.zeros(len(batch.rows), np.uint8)
    if (dense := embeddings.dense_vecs) is not None:
        errors[~dense.any(axis=1)] = NO_LENGTH
        errors[~np.isfinite(dense).all(axis=1)] = NOT_FINITE
    if (colbert := embeddings.colbert_vecs) is not None and "colbert_errors" in outputs:
        found = outputs["colbert_errors"]
        suspects = np.flatnonzero(found)
        rows = np.searchsorted(colbert.indptr, suspects, side="right") - 1
        for error in (NO_LENGTH, NOT_FINITE):
            errors[rows[found[suspects] == error]] = error
    elif colbert is not None:
        # Normalised, a vector with NaN is all NaN, and one with infinity is NaN and zeros. So only vectors whose first
        # number is NaN or 0 need a check.
        first = colbert.vectors[:, 0]
        suspects = np.flatnonzero(~np.isfinite(first) | (first == 0))
        vectors = colbert.vectors[suspects]
        rows = np.searchsorted(colbert.indptr, suspects, side="right") - 1
        errors[rows[~vectors.any(axis=1)]] = NO_LENGTH
        errors[rows[~np.isfinite(vectors).all(axis=1)]] = NOT_FINITE
    errors[~np.logical_and.reduceat(outputs["finite"], batch.cu_seqlens[:-1])] = NOT_FINITE
    return errors


def _lacks_memory(batch: Batch, dtype: torch.dtype, device: torch.device) -> FailedRow:
    detail = (
        f"one chunk of {batch.max_seqlen:,} tokens does not fit the memory of {device} in {_name(dtype)}; "
        "lower --max-length, or use --device cpu"
    )
    return FailedRow(row=int(batch.rows[0]), reason=OUT_OF_MEMORY, detail=detail)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DEFAULT_LENGTH = 512
"tokens of a text, as in FlagEmbedding"


def resolve_length(value: int | None, checkpoint: Checkpoint, *, option: str) -> int:
    """Return `value`, or the default length; raise UsageError if it is more than the checkpoint's maximum."""
    if value is not None and value > checkpoint.max_length:
        raise UsageError(f"{option} {value}: {checkpoint.name} holds at most {checkpoint.max_length} tokens")
    return value or min(DEFAULT_LENGTH, checkpoint.max_length)


class TextEncoder:
    """A loaded checkpoint that encodes texts into some of its outputs, float32 after a forward pass in `dtype`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        outputs: Sequence[Output],
        device: str,
        dtype: Dtype,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.outputs = tuple(outputs)
        self.device = device
        self.dtype = dtype
        self.max_batch_tokens = max_batch_tokens or machine.auto_batch_tokens(device)
        self.tokenizer = load_tokenizer(checkpoint)
        self.model = load_model(checkpoint, device=device, dtype=dtype)
        self.batch_encoder = self.make_encoder()

    def select(self, outputs: Sequence[Output]) -> TextEncoder:
        """Return an encoder with the same weights for some of the checkpoint's outputs."""
        selected = copy(self)
        selected.outputs = tuple(outputs)
        selected.batch_encoder = selected.make_encoder()
        return selected

    def make_encoder(self, *, num_threads: int = 1, parallel_map: ParallelMap | None = None) -> BatchEncoder:
        """Return an encoder of batches, `num_threads` of them at once."""
        options = OutputOptions(
            outputs=self.outputs,
            special_ids=self.tokenizer.special_ids,
            dense_dtype="float32",
            colbert_dtype="float32",
        )
        return BatchEncoder(
            self.model,
            options,
            retries=load_retries(self.checkpoint, device=self.device, dtype=self.dtype),
            num_threads=num_threads,
            parallel_map=parallel_map,
        )

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer, as in run.json."""
        return self.tokenizer.serialisation_hash

    def format_token(self, token_id: int) -> str:
        """Return a token as the model card prints it: decoded alone, without the mark for the start of a word.

        The mark alone is a token too and is returned unchanged.
        """
        decoded = self.tokenizer.backend.decode([token_id], skip_special_tokens=False)
        return str(decoded).strip() or self.tokenizer.token(token_id)

    def tokenise(self, texts: Sequence[str], *, max_length: int) -> TokenisedTexts:
        """Tokenise texts and truncate them to `max_length` tokens."""
        return tokenise_texts(texts, self.tokenizer, max_length=max_length)

    def encode_tokens(self, texts: TokenisedTexts) -> Iterator[Embeddings | FailedRow]:
        """Yield the embeddings of texts in packed batches, longest texts first; rows are indices of the texts."""
        return self.batch_encoder.encode_all(pack_texts(texts, max_batch_tokens=self.max_batch_tokens))

    def try_texts(
        self, texts: Sequence[str], *, max_length: int
    ) -> tuple[Embeddings | None, list[FailedRow], TokenisedTexts]:
        """Return the embeddings of texts in their order, the texts that cannot be encoded, and all tokens.

        The rows of the embeddings are indices of the texts; the embeddings are None if no text can be encoded.
        """
        tokenised = self.tokenise(texts, max_length=max_length)
        results = list(self.encode_tokens(tokenised))
        failed = [result for result in results if isinstance(result, FailedRow)]
        parts = [result for result in results if isinstance(result, Embeddings)]
        if not parts:
            return None, failed, tokenised
        joined = concat_embeddings(parts)
        order = np.argsort(joined.rows)
        return select_rows(joined, order, rows=joined.rows[order]), failed, tokenised

    def encode_texts(self, texts: Sequence[str], *, max_length: int) -> tuple[Embeddings, TokenisedTexts]:
        """Return the embeddings of texts in their order, and their tokens; raise ModelError if one fails."""
        embeddings, failed, tokenised = self.try_texts(texts, max_length=max_length)
        if failed or embeddings is None:
            raise ModelError(f"a text cannot be encoded: {failed[0].reason} ({failed[0].detail})")
        return embeddings, tokenised


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedTexts:
    """Some texts as tokens."""

    input_ids: tuple[NDArray[np.int32], ...]
    "of each text, with <s> and </s>"
    truncated: int
    "texts that lost tokens"

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[R] tokens of each text."""
        return np.array([len(ids) for ids in self.input_ids], np.int64)


def tokenise_texts(texts: Sequence[str], tokenizer: Tokenizer, *, max_length: int) -> TokenisedTexts:
    """Tokenise texts and truncate those longer than `max_length` tokens, whose last token stays `</s>`."""
    encoded = tokenizer.encode(list(texts))
    cut = [np.append(ids[: max_length - 1], ids[-1]) if len(ids) > max_length else ids for ids in encoded]
    return TokenisedTexts(input_ids=tuple(cut), truncated=sum(len(ids) > max_length for ids in encoded))


def pack_texts(texts: TokenisedTexts, *, max_batch_tokens: int) -> Iterator[Batch]:
    """Yield texts as packed batches, longest first; a batch's rows are indices of `texts`."""
    num_tokens = texts.num_tokens
    for rows in batch_rows(num_tokens, max_batch_tokens=max_batch_tokens):
        lengths = num_tokens[rows]
        yield Batch(
            rows=rows,
            input_ids=np.concatenate([texts.input_ids[row] for row in rows]).astype(np.int64),
            cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            max_seqlen=int(lengths.max()),
        )

"""Batches through model and heads: in halves where memory runs out, again in float32 where a number is none.

A batch is launched, which queues all its work on the device and waits for none of it, and collected. On CUDA one batch
is launched before the one before it is collected, so that within a window the device has work while the host looks at
what came back, hands it over and packs the next. A CPU does the work as it is launched; there several batches may go
through the model at once, each in a thread that takes its share of the cores.

A row that comes out of neither is data like any other: it is given back as failed, with its reason.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.config import VectorDtype
from m3cli.encoder.batcher import split_batch
from m3cli.encoder.device import lacks_memory
from m3cli.encoder.embeddings import select_rows
from m3cli.encoder.heads import Wanted, build_embeddings, run_heads
from m3cli.encoder.mcls import pool_as_cls, run_with_added
from m3cli.encoder.model import Model, run_model
from m3cli.encoder.transfer import Fetched, fetch, open_stream
from m3cli.errors import ModelTooLarge
from m3cli.records import Batch, Embeddings, Output

NOT_A_NUMBER = "not a number in the output"
OUT_OF_MEMORY = "out of memory"
FAULTS = ("", "NaN or infinity", "a vector of length 0")
_NOT_FINITE, _NO_LENGTH = 1, 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    """A row that the model cannot encode, and why."""

    row: int
    "its place in the shard"
    reason: str
    detail: str


Spread = Callable[[Callable[[Batch], "_BatchResult | None"], Iterable[Batch]], Generator["_BatchResult | None"]]
"calls a function for each of some batches, several at once, and yields what it returns, in order"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """A batch whose work is queued on the device."""

    batch: Batch
    outputs: Fetched
    "what `run_heads` makes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchResult:
    """What came of a batch."""

    batch: Batch
    embeddings: Embeddings
    faults: NDArray[np.uint8]
    "[B] what is wrong with a row, an index of FAULTS; 0: nothing"

    @property
    def whole(self) -> NDArray[np.bool_]:
        """[B] whether a row can be written."""
        whole: NDArray[np.bool_] = self.faults == 0
        return whole


class BatchEncoder:
    """A loaded model, and what its device was found to hold."""

    def __init__(
        self,
        model: Model,
        *,
        outputs: Collection[Output],
        special_ids: Collection[int],
        dense_dtype: VectorDtype = "float16",
        colbert_dtype: VectorDtype = "float16",
        colbert_weights: bool = False,
        mcls: int = 0,
        load_float32: Callable[[], Model] | None = None,
    ) -> None:
        self.model = model
        self.mcls = mcls
        "text tokens to a <s>; 0: a row has one"
        self.max_tokens: int | None = None
        "of a batch of several rows; None until the device's memory has run out"
        self.ahead = int(model.device.type == "cuda")
        "batches that are launched before the first of them is collected"
        self.spread: Spread | None = None
        "None: batches go one after the other"
        self.lanes = 1
        "batches that `spread` has at once"
        self._wanted = Wanted(
            outputs=outputs,
            special_ids=special_ids,
            dense_dtype=dense_dtype,
            colbert_dtype=colbert_dtype,
            vector_weights=colbert_weights,
        )
        self._load_float32 = load_float32
        self._exact: Model | None = None
        self._stream = open_stream(model.device)

    def encode(self, batch: Batch) -> Iterator[Embeddings | FailedRow]:
        """Yield a batch's rows, in order: at once, or in parts where memory does not hold it whole."""
        return self.encode_all((batch,))

    def encode_all(self, batches: Iterable[Batch]) -> Iterator[Embeddings | FailedRow]:
        """Yield the rows of batches, in order, as `encode` does; the device goes on while they are looked at."""
        return self._encode_in_turn(batches) if self.spread is None else self._encode_at_once(batches, self.spread)

    def _encode_at_once(self, batches: Iterable[Batch], spread: Spread) -> Iterator[Embeddings | FailedRow]:
        source, drawn = iter(batches), deque[Batch]()
        lacking: Batch | None = None
        while True:
            left, lacking = chain(tuple(drawn), source), None
            drawn.clear()
            with closing(spread(self._run, self._draw(left, drawn))) as results:
                for made in results:
                    batch = drawn.popleft()
                    if made is None:
                        lacking = batch
                        break
                    yield from self._repair(made)
            if lacking is None:
                return
            # By now the others have ended, and what they held is free.
            yield from self._encode_in_turn((lacking,))

    def _draw(self, batches: Iterable[Batch], drawn: deque[Batch]) -> Iterator[Batch]:
        """Yield batches as memory holds them, and keep them in `drawn` too."""
        for batch in self._fit(batches):
            drawn.append(batch)
            yield batch

    def _fit(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, those that are known to be too large when their turn comes in halves."""
        for batch in batches:
            if self._is_too_large(batch):
                yield from self._fit(split_batch(batch))
            else:
                yield batch

    def _is_too_large(self, batch: Batch) -> bool:
        return len(batch.rows) > 1 and self.max_tokens is not None and len(batch.input_ids) > self.max_tokens

    def _run(self, batch: Batch) -> _BatchResult | None:
        """Return what comes of a batch; None: memory ran out."""
        launched = self._launch(self.model, batch)
        return None if launched is None else _collect(launched)

    def _encode_in_turn(self, batches: Iterable[Batch]) -> Iterator[Embeddings | FailedRow]:
        waiting = deque[_Launched]()
        yield from self._encode_ahead(batches, waiting)
        yield from self._collect_all(waiting)

    def _encode_ahead(self, batches: Iterable[Batch], waiting: deque[_Launched]) -> Iterator[Embeddings | FailedRow]:
        """Yield rows as `_encode_in_turn` does, but leave the last batches launched, to be collected later."""
        for batch in self._fit(batches):
            launched = self._launch(self.model, batch)
            if launched is None and waiting:
                yield from self._collect_all(waiting)  # what waits holds memory too
                launched = self._launch(self.model, batch)
            if launched is not None:
                waiting.append(launched)
                del launched  # or its outputs would be kept until the next batch is launched
                yield from self._collect_all(waiting, but=self.ahead)
            elif len(batch.rows) == 1:
                torch.cuda.empty_cache()
                yield _lacks_memory(batch, self.model.dtype, self.model.device)
            else:
                self._reduce_batch_limit(batch)
                yield from self._encode_ahead((batch,), waiting)  # now in halves

    def _reduce_batch_limit(self, batch: Batch) -> None:
        torch.cuda.empty_cache()
        self.max_tokens = len(batch.input_ids) // 2
        _log.warning(
            "out of memory with a batch of %d tokens; from here on batches have at most %d",
            len(batch.input_ids),
            self.max_tokens,
        )

    def _launch(self, model: Model, batch: Batch) -> _Launched | None:
        """Queue a batch's work; None: memory ran out.

        What goes on after that does so outside the handler of the error, whose traceback would keep the tensors of the
        failed batch alive.
        """
        try:
            if self.mcls:
                model = pool_as_cls(model)
                states, layout = run_with_added(model, batch, every=self.mcls)
            else:
                states, layout = run_model(model, batch)
            made = run_heads(model, batch, states, layout, self._wanted)
            return _Launched(batch=batch, outputs=fetch(made, self._stream))
        except (RuntimeError, MemoryError) as error:
            if lacks_memory(error):
                return None
            raise

    def _collect_all(self, waiting: deque[_Launched], *, but: int = 0) -> Iterator[Embeddings | FailedRow]:
        """Yield the rows of the batches that wait, first to last, all but the last `but` of them at most."""
        while len(waiting) > but:
            collected = [_collect(waiting.popleft())]
            if not collected[0].whole.all():  # what waits holds memory that float32 needs
                collected += [_collect(launched) for launched in waiting]
                waiting.clear()
            for made in collected:
                yield from self._repair(made)

    def _repair(self, made: _BatchResult) -> Iterator[Embeddings | FailedRow]:
        """Yield the rows that hold numbers only, and each other row again on its own, in float32."""
        if made.whole.all():
            yield made.embeddings
            return
        good = np.flatnonzero(made.whole)
        if len(good):
            yield select_rows(made.embeddings, good, rows=made.embeddings.rows[good])
        for place in np.flatnonzero(~made.whole).tolist():
            yield self._encode_exactly(_single_out(made.batch, place), fault=int(made.faults[place]))

    def _encode_exactly(self, batch: Batch, *, fault: int) -> Embeddings | FailedRow:
        tried = _name(self.model.dtype)
        if self._load_float32 is not None:
            tried += " and in float32"
            try:
                if self._exact is None:
                    _log.warning("a row is not a number in %s; trying it in float32", _name(self.model.dtype))
                    self._exact = self._load_float32()
                launched = self._launch(self._exact, batch)
            except (ModelTooLarge, RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                launched = None
            if launched is None:
                torch.cuda.empty_cache()
                return _lacks_memory(batch, torch.float32, self.model.device)
            made = _collect(launched)
            if made.whole.all():
                return made.embeddings
            fault = int(made.faults[0])
        return FailedRow(row=int(batch.rows[0]), reason=NOT_A_NUMBER, detail=f"{FAULTS[fault]} in {tried}")


def _collect(launched: _Launched) -> _BatchResult:
    """Wait for a batch, and return what came of it."""
    outputs, batch = launched.outputs.wait(), launched.batch
    made = build_embeddings(batch, outputs)
    return _BatchResult(batch=batch, embeddings=made, faults=_find_faults(outputs["finite"], made, batch))


def _find_faults(finite: NDArray[np.bool_], made: Embeddings, batch: Batch) -> NDArray[np.uint8]:
    """Return what is wrong with each row [B]: numbers in its states or in what was made of them, or a zero vector."""
    faults = np.zeros(len(batch.rows), np.uint8)
    if (dense := made.dense_vecs) is not None:
        faults[~dense.any(axis=1)] = _NO_LENGTH
        faults[~np.isfinite(dense).all(axis=1)] = _NOT_FINITE
    if (colbert := made.colbert_vecs) is not None:
        # Divided by its norm, a vector with NaN in it is NaN, and one with infinity is NaN and zeros: those whose first
        # number is neither are whole, and the others few.
        first = colbert.vectors[:, 0]
        suspects = np.flatnonzero(~np.isfinite(first) | (first == 0))
        vectors = colbert.vectors[suspects]
        rows = np.searchsorted(colbert.indptr, suspects, side="right") - 1
        faults[rows[~vectors.any(axis=1)]] = _NO_LENGTH
        faults[rows[~np.isfinite(vectors).all(axis=1)]] = _NOT_FINITE
    faults[~np.logical_and.reduceat(finite, batch.cu_seqlens[:-1])] = _NOT_FINITE
    return faults


def _single_out(batch: Batch, place: int) -> Batch:
    first, last = batch.cu_seqlens[place : place + 2].tolist()
    return Batch(
        rows=batch.rows[place : place + 1],
        input_ids=batch.input_ids[first:last],
        cu_seqlens=np.array([0, last - first], np.int32),
        max_seqlen=last - first,
    )


def _lacks_memory(batch: Batch, dtype: torch.dtype, device: torch.device) -> FailedRow:
    detail = (
        f"one chunk of {batch.max_seqlen:,} tokens does not fit the memory of {device} in {_name(dtype)}; "
        "lower --max-length, or use --device cpu"
    )
    return FailedRow(row=int(batch.rows[0]), reason=OUT_OF_MEMORY, detail=detail)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

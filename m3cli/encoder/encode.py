"""Batches through model and heads: in halves where memory runs out, again in float32 where a number is none.

A row that comes out of neither is data like any other: it is given back as failed, with its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.config import VectorDtype
from m3cli.encoder.batcher import split_batch
from m3cli.encoder.heads import compute_embeddings, weigh_vectors
from m3cli.encoder.mcls import pool_as_cls, run_with_added
from m3cli.encoder.model import Model, run_model
from m3cli.encoder.picking import pick_rows
from m3cli.errors import ModelError
from m3cli.records import Batch, Embeddings, Output

NOT_A_NUMBER = "not a number in the output"
OUT_OF_MEMORY = "out of memory"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    """A row that the model cannot encode, and why."""

    row: int
    "its place in the shard"
    reason: str
    detail: str


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
        self._outputs = outputs
        self._special_ids = special_ids
        self._dense_dtype = dense_dtype
        self._colbert_dtype = colbert_dtype
        self._colbert_weights = colbert_weights
        self._load_float32 = load_float32
        self._exact: Model | None = None

    def encode(self, batch: Batch) -> Iterator[Embeddings | FailedRow]:
        """Yield a batch's rows, in order: at once, or in parts where memory does not hold it whole."""
        single = len(batch.rows) == 1
        if single or self.max_tokens is None or len(batch.input_ids) <= self.max_tokens:
            made = self._run(self.model, batch)
            if made is not None:
                yield from self._repair(batch, *made)
                return
            # Not in the handler of the error: there the traceback would keep the failed batch's tensors alive.
            torch.cuda.empty_cache()
            if single:
                yield _lacks_memory(batch, self.model.dtype, self.model.device)
                return
            self.max_tokens = len(batch.input_ids) // 2
            _log.warning(
                "out of memory with a batch of %d tokens; from here on batches have at most %d",
                len(batch.input_ids),
                self.max_tokens,
            )
        for half in split_batch(batch):
            yield from self.encode(half)

    def _run(self, model: Model, batch: Batch) -> tuple[Embeddings, NDArray[np.bool_]] | None:
        """Return a batch's embeddings and which of its rows [B] hold numbers only; None: memory ran out."""
        try:
            if self.mcls:
                model = pool_as_cls(model)
                states, layout = run_with_added(model, batch, every=self.mcls)
            else:
                states, layout = run_model(model, batch)
            made = compute_embeddings(
                model,
                batch,
                states,
                layout,
                outputs=self._outputs,
                special_ids=self._special_ids,
                dense_dtype=self._dense_dtype,
                colbert_dtype=self._colbert_dtype,
            )
            if self._colbert_weights and made.colbert_vecs is not None:
                weights = weigh_vectors(model, batch, states, special_ids=self._special_ids)
                made = replace(made, colbert_vecs=replace(made.colbert_vecs, weights=weights))
            return made, _find_whole_rows(states, made, batch)
        except torch.OutOfMemoryError:
            return None

    def _repair(self, batch: Batch, made: Embeddings, whole: NDArray[np.bool_]) -> Iterator[Embeddings | FailedRow]:
        """Yield the rows that hold numbers only, and each other row again on its own, in float32."""
        if whole.all():
            yield made
            return
        good = np.flatnonzero(whole)
        if len(good):
            yield pick_rows(made, good, rows=made.rows[good])
        for place in np.flatnonzero(~whole).tolist():
            yield self._encode_exactly(_single_out(batch, place))

    def _encode_exactly(self, batch: Batch) -> Embeddings | FailedRow:
        detail = f"NaN or infinity in {_name(self.model.dtype)}"
        if self._load_float32 is not None:
            detail += " and in float32"
            try:
                if self._exact is None:
                    _log.warning("a row is not a number in %s; trying it in float32", _name(self.model.dtype))
                    self._exact = self._load_float32()
                made = self._run(self._exact, batch)
            except torch.OutOfMemoryError:
                made = None
            if made is None:
                torch.cuda.empty_cache()
                return _lacks_memory(batch, torch.float32, self.model.device)
            if made[1].all():
                return made[0]
        return FailedRow(row=int(batch.rows[0]), reason=NOT_A_NUMBER, detail=detail)


def encode_batch(
    model: Model,
    batch: Batch,
    *,
    outputs: Collection[Output],
    special_ids: Collection[int],
    dense_dtype: VectorDtype = "float16",
) -> Iterator[Embeddings]:
    """Yield the rows of a batch, in order, each of which must be encoded.

    Raises:
        ModelError: one of them cannot be.
    """
    encoder = BatchEncoder(model, outputs=outputs, special_ids=special_ids, dense_dtype=dense_dtype)
    for made in encoder.encode(batch):
        if isinstance(made, FailedRow):
            raise ModelError(f"{made.reason}: {made.detail}")
        yield made


def _find_whole_rows(states: torch.Tensor, made: Embeddings, batch: Batch) -> NDArray[np.bool_]:
    """Return which rows [B] hold numbers only, in their hidden states as in what was made of them."""
    num_tokens = len(batch.input_ids)
    finite = torch.isfinite(states[:num_tokens].sum(-1, dtype=torch.float32)).cpu().numpy()
    whole: NDArray[np.bool_] = np.logical_and.reduceat(finite, batch.cu_seqlens[:-1])
    if made.dense_vecs is not None:
        whole &= np.isfinite(made.dense_vecs).all(axis=1)
    if (lexical := made.lexical_weights) is not None:
        _mark(whole, lexical.indptr, np.flatnonzero(~np.isfinite(lexical.values)))
    if (colbert := made.colbert_vecs) is not None:
        # Divided by its norm, a vector with NaN in it is NaN, and one with infinity is NaN and zeros: those whose first
        # number is neither are whole, and the others few.
        first = colbert.vectors[:, 0]
        suspects = np.flatnonzero(~np.isfinite(first) | (first == 0))
        _mark(whole, colbert.indptr, suspects[~np.isfinite(colbert.vectors[suspects]).all(axis=1)])
    return whole


def _mark(whole: NDArray[np.bool_], indptr: NDArray[np.int64], places: NDArray[np.int64]) -> None:
    whole[np.searchsorted(indptr, places, side="right") - 1] = False


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

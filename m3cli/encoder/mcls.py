"""MCLS: a `<s>` before every so many tokens of a text, the dense vector the mean of their states.

BGE-M3's paper, Appendix B.2: long texts without fine-tuning gain from several `<s>`, one before every 256 tokens, whose
last hidden states are averaged. The first is the row's own. What is added is known by its place, as a text may hold
'<s>' itself; the other outputs see the row without it, and num_tokens does not count it, positions and batches do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.encoder.attention import SequenceLayout
from m3cli.encoder.batcher import lengths_with_mcls
from m3cli.encoder.model import Model, padded_num_tokens, run_model
from m3cli.encoder.transfer import send
from m3cli.records import Batch


def pool_as_cls(model: Model) -> Model:
    """Return the model with its dense vector taken from `<s>`, whatever pooling its checkpoint names."""
    return replace(model, checkpoint=replace(model.checkpoint, pooling="cls"))


@torch.inference_mode()
def run_with_added(model: Model, batch: Batch, *, every: int) -> tuple[torch.Tensor, SequenceLayout]:
    """Run a batch with `<s>` added, and return what `run_model` would for the batch without.

    The state of each row's `<s>` is the mean of the states of all of them.
    """
    lengths = np.diff(batch.cu_seqlens).astype(np.int64)
    longer, places = _insert(batch, lengths, every=every)
    states, attended = run_model(model, longer)
    added = np.ones(len(longer.input_ids), np.bool_)
    added[places] = False
    added[longer.cu_seqlens[:-1]] = True
    counts = np.add.reduceat(added, longer.cu_seqlens[:-1], dtype=np.int32)
    take = np.zeros(padded_num_tokens(len(places), device=model.device), np.int32)
    take[: len(places)] = places
    marks, counts_there, take_there, borders = send(model.device, np.flatnonzero(added), counts, take, batch.cu_seqlens)
    # `unsafe` leaves out checks of the lengths, which would wait for the device.
    means = torch.segment_reduce(
        states.index_select(0, marks).float(), "mean", lengths=counts_there, axis=0, unsafe=True
    )
    without = states.index_select(0, take_there)
    without.index_copy_(0, borders[:-1].long(), means.to(without.dtype))
    # For the heads only, which go by these: nothing is attended to any more.
    layout = replace(attended, cu_seqlens=borders, max_seqlen=batch.max_seqlen, num_tokens=len(batch.input_ids))
    return without, layout


def _insert(batch: Batch, lengths: NDArray[np.int64], *, every: int) -> tuple[Batch, NDArray[np.int64]]:
    """Return a batch with `<s>` added, and the places there of the tokens that it had."""
    longer = lengths_with_mcls(lengths, every=every)
    cu_seqlens = np.concatenate(([0], np.cumsum(longer)))
    place = np.arange(len(batch.input_ids)) - np.repeat(batch.cu_seqlens[:-1].astype(np.int64), lengths)
    # Before token p of a row (0 is its <s>) stand those that were added to the whole `every`s before it; </s> has none.
    before = np.minimum(np.maximum(place - 1, 0) // every, np.repeat(longer - lengths, lengths))
    places = np.repeat(cu_seqlens[:-1], lengths) + place + before
    input_ids = np.full(cu_seqlens[-1], batch.input_ids[0])  # a row begins with <s>
    input_ids[places] = batch.input_ids
    return (
        Batch(
            rows=batch.rows,
            input_ids=input_ids,
            cu_seqlens=cu_seqlens.astype(np.int32),
            max_seqlen=int(longer.max()),
        ),
        places,
    )

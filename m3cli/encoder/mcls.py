"""MCLS: a `<s>` before every so many tokens of a text; the dense vector is the mean of their states.

BGE-M3's paper (Appendix B.2) adds one before every 256 tokens, which helps long texts without fine-tuning. The first is
the row's own. Sparse and ColBERT outputs and num_tokens ignore those that are added; positions and batches count them.
They are identified by position, because a text may contain '<s>' itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.encoder.attention import SequenceLayout
from m3cli.encoder.chunker import lengths_with_mcls
from m3cli.encoder.device import send
from m3cli.encoder.model import Model, padded_num_tokens, run_model
from m3cli.records import Batch, concat_ranges


def pool_as_cls(model: Model) -> Model:
    """Return the model with pooling cls, whatever pooling its checkpoint names."""
    return replace(model, checkpoint=replace(model.checkpoint, pooling="cls"))


@torch.inference_mode()
def run_with_added(model: Model, batch: Batch, *, every: int) -> tuple[torch.Tensor, SequenceLayout]:
    """Run a batch with `<s>` added, and return states and layout without those.

    The state of each row's own `<s>` is the mean over all of its row.
    """
    lengths = np.diff(batch.cu_seqlens).astype(np.int64)
    longer, indices = _insert(batch, lengths, every=every)
    states, attended = run_model(model, longer)
    added = np.ones(len(longer.input_ids), np.bool_)
    added[indices] = False
    added[longer.cu_seqlens[:-1]] = True
    counts = np.add.reduceat(added, longer.cu_seqlens[:-1], dtype=np.int32)
    take = np.zeros(padded_num_tokens(len(indices), device=model.device), np.int32)
    take[: len(indices)] = indices
    marks, num_marks, kept, borders = send(model.device, np.flatnonzero(added), counts, take, batch.cu_seqlens)
    # `unsafe` omits checks of the lengths, which would wait for the device.
    means = torch.segment_reduce(states.index_select(0, marks).float(), "mean", lengths=num_marks, axis=0, unsafe=True)
    without = states.index_select(0, kept)
    without.index_copy_(0, borders[:-1].long(), means.to(without.dtype))
    # For the heads only: no attention follows.
    layout = replace(attended, cu_seqlens=borders, max_seqlen=batch.max_seqlen, num_tokens=len(batch.input_ids))
    return without, layout


def _insert(batch: Batch, lengths: NDArray[np.int64], *, every: int) -> tuple[Batch, NDArray[np.int64]]:
    """Return a batch with `<s>` added, and the indices in it of the batch's own tokens."""
    longer = lengths_with_mcls(lengths, every=every)
    cu_seqlens = np.concatenate(([0], np.cumsum(longer)))
    _, position = concat_ranges(0, lengths)
    # (p - 1) // every of them precede token p of a row, whose own <s> is token 0; none is added before </s>.
    before = np.minimum(np.maximum(position - 1, 0) // every, np.repeat(longer - lengths, lengths))
    indices = np.repeat(cu_seqlens[:-1], lengths) + position + before
    input_ids = np.full(cu_seqlens[-1], batch.input_ids[0])  # a row begins with <s>
    input_ids[indices] = batch.input_ids
    return (
        Batch(
            rows=batch.rows,
            input_ids=input_ids,
            cu_seqlens=cu_seqlens.astype(np.int32),
            max_seqlen=int(longer.max()),
        ),
        indices,
    )

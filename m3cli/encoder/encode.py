"""One batch through model and heads, in halves where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import torch

from m3cli.config import VectorDtype
from m3cli.encoder.batcher import split_batch
from m3cli.encoder.heads import compute_embeddings
from m3cli.encoder.model import Model, run_model
from m3cli.errors import ModelError
from m3cli.records import Batch, Embeddings, Output

_log = logging.getLogger(__name__)


def encode_batch(
    model: Model,
    batch: Batch,
    *,
    outputs: Collection[Output],
    special_ids: Collection[int],
    dense_dtype: VectorDtype = "float16",
) -> Iterator[Embeddings]:
    """Yield the embeddings of a batch; of its halves, in order, where the device's memory does not hold it whole.

    Raises:
        ModelError: one single row does not fit the device's memory.
    """
    try:
        states, layout = run_model(model, batch)
        made = compute_embeddings(
            model, batch, states, layout, outputs=outputs, special_ids=special_ids, dense_dtype=dense_dtype
        )
    except torch.OutOfMemoryError as error:
        made = None
        if len(batch.rows) == 1:
            raise ModelError(
                f"one chunk of {batch.max_seqlen:,} tokens does not fit the memory of {model.device}; "
                "lower --max-length, or use --device cpu"
            ) from error
    if made is not None:
        yield made
        return
    # Outside the handler: there the traceback would keep the failed batch's tensors alive.
    _log.warning("out of memory with a batch of %d tokens; trying its halves", len(batch.input_ids))
    torch.cuda.empty_cache()
    for half in split_batch(batch):
        yield from encode_batch(model, half, outputs=outputs, special_ids=special_ids, dense_dtype=dense_dtype)

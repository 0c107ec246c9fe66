"""Outputs of the heads without asynchronous copies."""

from __future__ import annotations

from collections.abc import Collection

import torch

from m3cli.config import VectorDtype
from m3cli.encoder.attention import SequenceLayout
from m3cli.encoder.heads import OutputOptions, build_embeddings, run_heads
from m3cli.encoder.model import Model
from m3cli.records import Batch, Embeddings, Output


def compute_embeddings(
    model: Model,
    batch: Batch,
    last_hidden_state: torch.Tensor,
    layout: SequenceLayout,
    *,
    outputs: Collection[Output],
    special_ids: Collection[int],
    dense_dtype: VectorDtype = "float16",
    colbert_dtype: VectorDtype = "float16",
) -> Embeddings:
    """Run the heads and wait for their outputs."""
    options = OutputOptions(
        outputs=outputs, special_ids=special_ids, dense_dtype=dense_dtype, colbert_dtype=colbert_dtype
    )
    tensors = run_heads(model, batch, last_hidden_state, layout, options)
    return build_embeddings(batch, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})

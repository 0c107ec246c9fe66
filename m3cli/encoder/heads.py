"""Hidden states to the three outputs, as FlagEmbedding's `BGEM3FlagModel` means them (its `m3/modeling.py`).

- dense: the pooled state (of `<s>` for BGE-M3), L2-normalised;
- sparse: relu(sparse_linear(h)), for each token id of a row the maximum over its positions, specials and zeros dropped;
- colbert: colbert_linear(h) of every token but `<s>`, L2-normalised: n tokens give n - 1 vectors.

Norms and sums are float32 whatever the model's dtype. Everything is reduced on the device; what leaves it is numpy.

Shapes: B rows, N tokens, M >= N states with the filling behind them, C hidden width, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from numpy.typing import NDArray

from m3cli.config import VectorDtype
from m3cli.encoder.attention import SequenceLayout
from m3cli.encoder.checkpoint import Pooling
from m3cli.encoder.linear import Linear
from m3cli.encoder.model import Model
from m3cli.records import Batch, Embeddings, LexicalWeights, Output, TokenMatrices


@torch.inference_mode()
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
    """Compute the asked-for outputs of a batch from its hidden states [M, C], M >= N as `run_model` gives them."""
    dense = lexical = colbert = None
    if "dense" in outputs:
        dense = pool_rows(last_hidden_state, layout, pooling=model.checkpoint.pooling).to(getattr(torch, dense_dtype))
    if "sparse" in outputs:
        assert model.sparse_linear is not None
        input_ids = torch.from_numpy(batch.input_ids).to(model.device)
        lexical = weigh_tokens(last_hidden_state, input_ids, layout, model.sparse_linear, special_ids=special_ids)
    if "colbert" in outputs:
        assert model.colbert_linear is not None
        colbert = project_tokens(last_hidden_state, layout, model.colbert_linear).to(getattr(torch, colbert_dtype))
    indptr = batch.cu_seqlens.astype(np.int64) - np.arange(len(batch.rows) + 1)
    return Embeddings(
        rows=batch.rows,
        dense_vecs=None if dense is None else dense.cpu().numpy(),
        lexical_weights=lexical,
        colbert_vecs=None if colbert is None else TokenMatrices(indptr=indptr, vectors=colbert.cpu().numpy()),
    )


def pool_rows(hidden: torch.Tensor, layout: SequenceLayout, *, pooling: Pooling) -> torch.Tensor:
    """Return [B, C] float32 of norm 1: the state of `<s>`, of the last token, or the mean of all tokens."""
    cu_seqlens = layout.cu_seqlens.long()
    if pooling == "cls":
        pooled = hidden[cu_seqlens[:-1]].float()
    elif pooling == "lasttoken":
        pooled = hidden[cu_seqlens[1:] - 1].float()
    else:
        states = hidden[: layout.num_tokens].float()
        pooled = torch.segment_reduce(states, "mean", lengths=cu_seqlens.diff(), axis=0)
    return F.normalize(pooled, dim=-1)


def weigh_tokens(
    hidden: torch.Tensor,
    input_ids: torch.Tensor,
    layout: SequenceLayout,
    sparse_linear: Linear,
    *,
    special_ids: Collection[int],
) -> LexicalWeights:
    """Return the lexical weights of each row, one weight an id: the maximum over its positions in the row."""
    weights = weigh_positions(hidden, input_ids, sparse_linear, special_ids=special_ids)
    keep = weights > 0
    num_rows = len(layout.cu_seqlens) - 1
    lengths = layout.cu_seqlens.long().diff()
    rows = torch.repeat_interleave(torch.arange(num_rows, device=hidden.device), lengths, output_size=len(input_ids))
    # One sorted key for (row, id): ids ascend within a row, rows ascend, and equal pairs fall together.
    keys, inverse = torch.unique((rows[keep] << 32) | input_ids[keep], return_inverse=True)
    values = torch.zeros(len(keys), device=hidden.device).scatter_reduce_(0, inverse, weights[keep], "amax")
    counts = torch.bincount(keys >> 32, minlength=num_rows)
    indptr = np.zeros(num_rows + 1, np.int64)
    np.cumsum(counts.cpu().numpy(), out=indptr[1:])
    indices = (keys & 0xFFFFFFFF).cpu().numpy().astype(np.uint32)
    return LexicalWeights(indptr=indptr, indices=indices, values=values.cpu().numpy())


def weigh_positions(
    hidden: torch.Tensor, input_ids: torch.Tensor, sparse_linear: Linear, *, special_ids: Collection[int]
) -> torch.Tensor:
    """Return [N] float32, the lexical weight of the token at each position: relu(sparse_linear(h)), specials 0."""
    weights = torch.relu(sparse_linear.apply(hidden)).squeeze(-1)[: len(input_ids)].float()
    for special in special_ids:
        weights[input_ids == special] = 0.0
    return weights


@torch.inference_mode()
def weigh_vectors(
    model: Model,
    batch: Batch,
    last_hidden_state: torch.Tensor,
    *,
    special_ids: Collection[int],
) -> NDArray[np.float32]:
    """Return [N - B] the lexical weight of the token that each ColBERT vector of a batch is of, 0 for `</s>`."""
    assert model.sparse_linear is not None
    input_ids = torch.from_numpy(batch.input_ids).to(model.device)
    weights = weigh_positions(last_hidden_state, input_ids, model.sparse_linear, special_ids=special_ids)
    kept: NDArray[np.float32] = np.delete(weights.cpu().numpy(), batch.cu_seqlens[:-1])
    return kept


def project_tokens(hidden: torch.Tensor, layout: SequenceLayout, colbert_linear: Linear) -> torch.Tensor:
    """Return [N - B, D] float32 of norm 1: every token but `<s>`, `</s>` included, rows in order."""
    keep = torch.ones(layout.num_tokens, dtype=torch.bool, device=hidden.device)
    keep[layout.cu_seqlens[:-1].long()] = False
    # The filling goes through the matmul too, so that its shape is one of few (TOKEN_STEP), and is dropped after it.
    projected = colbert_linear.apply(hidden)[: layout.num_tokens]
    return F.normalize(projected[keep].float(), dim=-1)

"""The three outputs from hidden states, as FlagEmbedding's `BGEM3FlagModel` defines them (its `m3/modeling.py`).

- dense: the pooled state (of `<s>` for BGE-M3), L2-normalised;
- sparse: relu(sparse_linear(h)), for each token id of a row the maximum over its positions, specials and zeros dropped;
- colbert: colbert_linear(h) of every token but `<s>`, L2-normalised: n tokens give n - 1 vectors.

Norms and sums are float32 with every dtype. Everything is reduced on the device without waiting for it: indices come
from the host, and lexical weights, whose number only the device knows, get memory for all and are cut on the host.

Shapes: B rows, N tokens, M >= N states with the padding after them, C hidden width, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from numpy.typing import NDArray

from m3cli.config import VectorDtype
from m3cli.encoder.attention import SequenceLayout
from m3cli.encoder.checkpoint import Pooling
from m3cli.encoder.device import send
from m3cli.encoder.linear import Linear
from m3cli.encoder.model import Model
from m3cli.records import Batch, Embeddings, LexicalWeights, Output, TokenMatrices

NOT_FINITE, NO_LENGTH = 1, 2
"errors of a vector or a row: NaN or infinity, or a vector of length 0"
NO_KEY = np.iinfo(np.int64).max
"key without a lexical weight; greater than all keys, (row << 32) | token id"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Outputs of the heads, and their dtypes."""

    outputs: Collection[Output]
    special_ids: Collection[int]
    "tokens without a lexical weight"
    dense_dtype: VectorDtype = "float16"
    colbert_dtype: VectorDtype = "float16"
    quantise: Literal["int8", "binary"] | None = None
    "rounds ColBERT vectors on the device, which halves the copy to the host or more; None: they have colbert_dtype"
    vector_weights: bool = False
    "whether each ColBERT vector comes with the lexical weight of its token"


@torch.inference_mode()
def run_heads(
    model: Model,
    batch: Batch,
    last_hidden_state: torch.Tensor,
    layout: SequenceLayout,
    options: OutputOptions,
) -> dict[str, torch.Tensor]:
    """Compute the outputs of a batch from its hidden states [M, C] of `run_model`.

    Returns:
        tensors on the device: dense_vecs [B, C]; lexical_keys [N] int64 and lexical_values [N] float32; colbert_vecs
        [N - B, D] and vector_weights [N - B] float32; and finite [N], whether a token's state and lexical weight are.
        Quantised, colbert_vecs are int8 with colbert_scales [N - B] float32, or uint8 [N - B, D / 8], and come with
        colbert_errors [N - B] uint8, 0 for a finite vector that is not zero.
    """
    outputs = {"finite": torch.isfinite(last_hidden_state[: len(batch.input_ids)].sum(-1, dtype=torch.float32))}
    with_vectors = "colbert" in options.outputs
    vector_weights = with_vectors and options.vector_weights
    if "dense" in options.outputs:
        pooled = pool_rows(last_hidden_state, layout, pooling=model.checkpoint.pooling)
        outputs["dense_vecs"] = pooled.to(getattr(torch, options.dense_dtype))
    rows_of_tokens = np.repeat(np.arange(len(batch.rows), dtype=np.int32), np.diff(batch.cu_seqlens))
    tokens_of_vectors = np.delete(np.arange(len(batch.input_ids), dtype=np.int32), batch.cu_seqlens[:-1])
    input_ids, rows, tokens = send(model.device, batch.input_ids, rows_of_tokens, tokens_of_vectors)
    if "sparse" in options.outputs or vector_weights:
        assert model.sparse_linear is not None
        weights = weigh_positions(last_hidden_state, input_ids, model.sparse_linear, special_ids=options.special_ids)
        outputs["finite"] &= torch.isfinite(weights)
        if "sparse" in options.outputs:
            outputs["lexical_keys"], outputs["lexical_values"] = find_maxima(weights, input_ids, rows)
        if vector_weights:
            outputs["vector_weights"] = weights.index_select(0, tokens)
    if with_vectors:
        assert model.colbert_linear is not None
        vectors = project_tokens(last_hidden_state, tokens, model.colbert_linear)
        if options.quantise is None:
            outputs["colbert_vecs"] = vectors.to(getattr(torch, options.colbert_dtype))
        else:
            outputs |= quantise_vectors(vectors, options.quantise)
    return outputs


def quantise_vectors(vectors: torch.Tensor, kind: Literal["int8", "binary"]) -> dict[str, torch.Tensor]:
    """Return quantised vectors [V, D] as outputs of `run_heads`, as embeddings.py does but for rounding."""
    # No torch.where with a number: it would copy the number to the device, and wait.
    errors = (~vectors.any(-1)).byte() * NO_LENGTH
    outputs = {"colbert_errors": errors.masked_fill_(~torch.isfinite(vectors).all(-1), NOT_FINITE)}
    if kind == "binary":
        bits = (vectors > 0).byte().view(len(vectors), -1, 8)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=vectors.device)
        outputs["colbert_vecs"] = (bits << shifts).sum(-1, dtype=torch.uint8)
        return outputs
    largest = vectors.abs().amax(-1, keepdim=True)
    # torch computes 127.0 / x as 127.0 * (1 / x), which rounds twice.
    factor = torch.full_like(largest, 127.0).div_(largest).masked_fill_(largest == 0, 0.0)
    numbers = (vectors * factor).round_()
    norms = numbers.square().sum(-1).sqrt_()
    outputs["colbert_vecs"] = numbers.to(torch.int8)
    outputs["colbert_scales"] = (1.0 / norms).masked_fill_(norms == 0, 0.0)
    return outputs


def build_embeddings(batch: Batch, outputs: Mapping[str, NDArray[Any]]) -> Embeddings:
    """Return the outputs of `run_heads`, copied to the host, as a record."""
    lexical = colbert = None
    if "lexical_keys" in outputs:
        lexical = _build_weights(outputs["lexical_keys"], outputs["lexical_values"], num_rows=len(batch.rows))
    if "colbert_vecs" in outputs:
        indptr = batch.cu_seqlens.astype(np.int64) - np.arange(len(batch.rows) + 1)
        colbert = TokenMatrices(
            indptr=indptr,
            vectors=outputs["colbert_vecs"],
            scales=outputs.get("colbert_scales"),
            weights=outputs.get("vector_weights"),
        )
    return Embeddings(
        rows=batch.rows, dense_vecs=outputs.get("dense_vecs"), lexical_weights=lexical, colbert_vecs=colbert
    )


def pool_rows(hidden: torch.Tensor, layout: SequenceLayout, *, pooling: Pooling) -> torch.Tensor:
    """Return [B, C] float32 of norm 1: the state of `<s>`, of the last token, or the mean of all tokens."""
    borders = layout.borders
    if pooling == "cls":
        pooled = hidden.index_select(0, borders[:-1]).float()
    elif pooling == "lasttoken":
        pooled = hidden.index_select(0, borders[1:] - 1).float()
    else:
        states = hidden[: layout.num_tokens].float()
        # `unsafe` omits checks of the lengths, which would wait for the device.
        pooled = torch.segment_reduce(states, "mean", lengths=borders.diff(), axis=0, unsafe=True)
    return F.normalize(pooled, dim=-1)


def find_maxima(
    weights: torch.Tensor, input_ids: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each token id of a row the largest of its weights [N] above 0.

    Returns:
        keys [N] int64, (row << 32) | token id, distinct and ascending, then NO_KEY; and their weights [N] float32.
    """
    keys = ((rows.long() << 32) | input_ids).masked_fill_(~(weights > 0), NO_KEY)  # NaN goes too
    keys, order = torch.sort(keys)
    is_first = torch.ones_like(keys)
    is_first[1:] = keys[1:] != keys[:-1]
    slots = torch.cumsum(is_first, 0) - 1
    values = torch.zeros_like(weights).scatter_reduce_(0, slots, weights.index_select(0, order), "amax")
    return torch.full_like(keys, NO_KEY).scatter_(0, slots, keys), values


def _build_weights(keys: NDArray[np.int64], values: NDArray[np.float32], *, num_rows: int) -> LexicalWeights:
    keys = keys[: np.searchsorted(keys, NO_KEY)]
    return LexicalWeights(
        indptr=np.searchsorted(keys, np.arange(num_rows + 1) << 32),
        indices=(keys & 0xFFFFFFFF).astype(np.uint32),
        values=values[: len(keys)].copy(),  # frees the memory of the others
    )


def weigh_positions(
    hidden: torch.Tensor, input_ids: torch.Tensor, sparse_linear: Linear, *, special_ids: Collection[int]
) -> torch.Tensor:
    """Return [N] float32, the lexical weight of the token at each position: relu(sparse_linear(h)), specials 0."""
    weights = torch.relu(sparse_linear.apply(hidden)).squeeze(-1)[: len(input_ids)].float()
    for special in special_ids:
        weights.masked_fill_(input_ids == special, 0.0)
    return weights


def project_tokens(hidden: torch.Tensor, tokens: torch.Tensor, colbert_linear: Linear) -> torch.Tensor:
    """Return [N - B, D] float32 of norm 1, of the tokens with these indices: all but `<s>`."""
    # Padding goes through the matmul too, so that few shapes occur (TOKEN_STEP).
    projected = colbert_linear.apply(hidden)
    return F.normalize(projected.index_select(0, tokens).float(), dim=-1)

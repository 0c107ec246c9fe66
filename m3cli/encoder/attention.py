"""Attention over packed sequences: every token attends to exactly the tokens of its own sequence.

There are three implementations. On CUDA, torch's variable-length flash attention reads `cu_seqlens`. On a CPU with AMX,
neighbouring sequences of equal length go through torch's flash attention for CPUs. Elsewhere neighbouring sequences of
nearly equal length are copied into one [H, S, L, D] block. A block goes through two batched matmuls and a softmax. L
is a multiple of LENGTH_STEP and S a power of two, because oneDNN keeps a kernel for each shape. Without AMX, flash
attention is slower than that (scripts/bench_results/LOG.md).

Flash attention keeps scores in float32. Matmuls round them to the states' dtype, as in transformers' eager attention;
their sums and softmax are float32.

Shapes: N tokens, H heads, S sequences of a block, L its padded length, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from numpy.typing import NDArray

from m3cli.encoder.device import AttentionKernel, choose_attention

LENGTH_STEP = 16
"tokens; lengths that round up to the same multiple share a block and are padded to it, for attention only"
BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"limit of the scores [H, S, L, L] of a block of several sequences"
BLOCK_BYTES = {"cpu": 3 << 20, "cuda": 1 << 30}
"limit of the queries, keys and values [3, H, S, L, D] of such a block: on a CPU they stay in its caches"
HELD_BYTES = {"cpu": 1 << 21, "cuda": 1 << 27}
"""limit of the scores in memory. Few heads with many queries each keep keys and values in the cache too
(scripts/bench_results/LOG.md)"""
MIN_QUERIES = 64
"queries of a sequence in one matmul, however many scores that is: fewer are slow"

WIDENED_KEYS = 256
"keys up to which a CPU's softmax is faster in float32 than in bfloat16, conversions included; the numbers are the same"

flash_attention: Callable[..., tuple[torch.Tensor, ...]] = torch.ops.aten._flash_attention_forward.default  # noqa: SLF001
"""what torch.nn.attention.varlen calls, which comes with torch 2.10 and takes 5 s to import torch._dynamo"""

_VARLEN_SEQUENCES = 65_535
"limit of CUDA's grid, in which the kernel has a row for each sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Neighbouring sequences of equal length."""

    span: slice
    "of their tokens in the batch"
    rows: slice
    "their places among the sequences of the block, or of the batch"
    length: int
    "tokens of each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Neighbouring sequences of a batch that are computed together."""

    sequences: int
    "S"
    length: int
    "L"
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """Offsets of a packed batch's sequences, in the form that the attention in use needs."""

    kernel: AttentionKernel
    blocks: tuple[Block, ...]
    "of `matmul`"
    groups: tuple[Group, ...]
    "of `flash`"
    cu_seqlens: torch.Tensor
    "[S + 1] int32 on the device, S >= B: the last border may be repeated (see pad_borders)"
    num_sequences: int
    "B"
    max_seqlen: int
    num_tokens: int
    "of the sequences; states after them are padding"

    @property
    def borders(self) -> torch.Tensor:
        """[B + 1] offsets of the batch's own sequences."""
        return self.cu_seqlens[: self.num_sequences + 1]


def lay_out(
    cu_seqlens: NDArray[np.int32],
    borders: torch.Tensor,
    *,
    num_heads: int,
    head_width: int,
    max_seqlen: int,
    dtype: torch.dtype,
) -> SequenceLayout:
    """Return a batch's layout for all layers; `borders` are its `cu_seqlens` on the device, padded or not."""
    device = borders.device
    kernel = choose_attention(device, dtype, head_width=head_width)
    if kernel == "varlen" and len(borders) - 1 > _VARLEN_SEQUENCES:
        kernel = "matmul"
    blocks: tuple[Block, ...] = ()
    if kernel == "matmul":
        max_tokens = BLOCK_BYTES[device.type] // (3 * num_heads * head_width * dtype.itemsize)
        blocks = plan_blocks(cu_seqlens, max_scores=BLOCK_SCORES[device.type] // num_heads, max_tokens=max_tokens)
    return SequenceLayout(
        kernel=kernel,
        blocks=blocks,
        groups=group_equal(cu_seqlens) if kernel == "flash" else (),
        cu_seqlens=borders,
        num_sequences=len(cu_seqlens) - 1,
        max_seqlen=max_seqlen,
        num_tokens=int(cu_seqlens[-1]),
    )


def group_equal(cu_seqlens: NDArray[np.int32]) -> tuple[Group, ...]:
    """Return the groups of sequences with these borders."""
    lengths = np.diff(cu_seqlens)
    return tuple(
        Group(
            span=slice(int(cu_seqlens[first]), int(cu_seqlens[last])),
            rows=slice(first, last),
            length=int(lengths[first]),
        )
        for first, last in find_stretches(lengths)
    )


def find_stretches(lengths: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Yield the (first, last + 1) of neighbours with equal lengths, in order."""
    return pairwise([0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)])


def pad_borders(cu_seqlens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Repeat the last border until the number of sequences is a power of two, so that few shapes occur on CUDA.

    Flash attention skips a sequence of no tokens. Padding tokens belong to no sequence and cost no attention.
    """
    num_sequences = len(cu_seqlens) - 1
    padded = min(1 << (num_sequences - 1).bit_length(), max(num_sequences, _VARLEN_SEQUENCES))
    return np.pad(cu_seqlens, (0, padded - num_sequences), mode="edge")


def plan_blocks(cu_seqlens: NDArray[np.int32], *, max_scores: int, max_tokens: int) -> tuple[Block, ...]:
    """Return blocks of the sequences with these borders.

    Neighbours whose lengths round up to the same L share a block. Its number of sequences is a power of two, with at
    most `max_scores` scores a head and `max_tokens` tokens, padding included, but at least one sequence.
    """
    padded = -(-np.diff(cu_seqlens).astype(np.int64) // LENGTH_STEP) * LENGTH_STEP
    blocks = []
    for first, last in find_stretches(padded):
        length = int(padded[first])
        limit = max(1, min(max_scores // length**2, max_tokens // length))
        while first < last:
            count = 1 << (min(last - first, limit).bit_length() - 1)
            groups = group_equal(cu_seqlens[first : first + count + 1])
            blocks.append(Block(sequences=count, length=length, groups=groups))
            first += count  # noqa: PLW2901  the rest
    return tuple(blocks)


def attend(qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Compute attention within each sequence.

    Args:
        qkv: [N, 3, H, D] queries, keys and values.
        layout: the batch's layout.

    Returns:
        [N, H * D]
    """
    if layout.kernel == "varlen":
        return _attend_varlen(qkv, layout)
    num_tokens, _, num_heads, head_width = qkv.shape
    out = torch.empty((num_tokens, num_heads, head_width), dtype=qkv.dtype, device=qkv.device)
    out[layout.num_tokens :].zero_()  # padding, see TOKEN_STEP
    for group in layout.groups:
        q, k, v = qkv[group.span].view(-1, group.length, 3, num_heads, head_width).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out[group.span] = attended.reshape(-1, num_heads, head_width)
    for block in layout.blocks:
        attended = _attend_block(_pad(qkv, block), block)
        for group in block.groups:
            by_sequence = attended[:, group.rows, : group.length].permute(1, 2, 0, 3)
            out[group.span].view(-1, group.length, num_heads, head_width).copy_(by_sequence)
    return out.view(num_tokens, num_heads * head_width)


def _pad(qkv: torch.Tensor, block: Block) -> torch.Tensor:
    """Return a block's queries, keys and values [3, H, S, L, D] from [N, 3, H, D], padding zero."""
    _, _, num_heads, head_width = qkv.shape
    padded = qkv.new_empty((3, num_heads, block.sequences, block.length, head_width))
    for group in block.groups:
        tokens = qkv[group.span].view(-1, group.length, 3, num_heads, head_width)
        padded[:, :, group.rows, : group.length] = tokens.permute(2, 3, 0, 1, 4)
        padded[:, :, group.rows, group.length :].zero_()
    return padded


def _attend_block(qkv: torch.Tensor, block: Block) -> torch.Tensor:
    """Return [H, S, L, D] from queries, keys and values [3, H, S, L, D], a slice of the queries at a time."""
    out = torch.empty_like(qkv[0])
    heads, rows = plan_slices(block, num_heads=len(out), max_scores=HELD_BYTES[qkv.device.type] // qkv.itemsize)
    for first in range(0, len(out), heads):
        q, k, v = qkv[:, first : first + heads]
        for start in range(0, block.length, rows):
            span = slice(start, start + rows)
            out[first : first + heads, :, span] = _attend_queries(q[:, :, span], k, v, block)
    return out


def _attend_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block) -> torch.Tensor:
    """Return [H, S, Q, D] from Q queries of each sequence, and keys and values [H, S, L, D]."""
    keys, unused = k.flatten(0, 1).transpose(1, 2), q.new_zeros(1, 1, 1)
    scores = torch.baddbmm(unused, q.flatten(0, 1), keys, beta=0, alpha=q.shape[-1] ** -0.5)
    scores = scores.view(*q.shape[:3], block.length)
    for group in block.groups:
        scores[:, group.rows, :, group.length :].fill_(-math.inf)
    widen = q.device.type == "cpu" and block.length <= WIDENED_KEYS
    shares = torch.softmax(scores, -1, dtype=torch.float32 if widen else None).to(q.dtype)
    return torch.bmm(shares.flatten(0, 1), v.flatten(0, 1)).view(q.shape)


def plan_slices(block: Block, *, num_heads: int, max_scores: int) -> tuple[int, int]:
    """Return how many heads of a block, and how many queries of each, are computed at once within `max_scores`."""
    to_queries = max_scores // (block.sequences * block.length)
    rows = min(block.length, max(MIN_QUERIES, to_queries // LENGTH_STEP * LENGTH_STEP))
    return max(1, min(num_heads, to_queries // rows)), rows


def _attend_varlen(qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    # The kernel does not write the rows of padding tokens: they hold any value, NaN too, until the heads drop them.
    q, k, v = qkv.unbind(1)
    borders, longest = layout.cu_seqlens, layout.max_seqlen
    attended = flash_attention(q, k, v, borders, borders, longest, longest, 0.0, False, False)[0]
    return attended.reshape(qkv.shape[0], -1)

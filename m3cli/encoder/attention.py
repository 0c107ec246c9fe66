"""Attention over packed sequences: every token attends to exactly the tokens of its own sequence.

There are three implementations. On CUDA, torch's variable-length flash attention reads `cu_seqlens`. On a CPU with AMX,
neighbouring sequences of equal length go through torch's flash attention for CPUs. Elsewhere neighbouring sequences of
nearly equal length are gathered into one [H, S, L, D] block. A block goes through two batched matmuls and a softmax. L
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

from m3cli.encoder.device import AttentionKernel, choose_attention, send

LENGTH_STEP = 16
"tokens; lengths that round up to the same multiple share a block and are padded to it, for attention only"
BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"limit of the scores [H, S, L, L] of a block of several sequences"
HELD_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""limit of the scores in memory: on a CPU they fit the second level cache. Few heads with many queries each keep keys
and values in the cache too (scripts/bench_results/LOG.md)"""
MIN_QUERIES = 64
"queries of a sequence in one matmul, however many scores that is: fewer are slow"

flash_attention: Callable[..., tuple[torch.Tensor, ...]] = torch.ops.aten._flash_attention_forward.default  # noqa: SLF001
"""what torch.nn.attention.varlen calls, which comes with torch 2.10 and takes 5 s to import torch._dynamo"""

_VARLEN_SEQUENCES = 65_535
"limit of CUDA's grid, in which the kernel has a row for each sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Neighbouring sequences of a batch that are computed together."""

    first: int
    "index of their first token"
    last: int
    "index after their last token"
    sequences: int
    "S"
    length: int
    "L"
    tokens: torch.Tensor | None
    "[S * L] token index of each position, padding repeats the last token; None: no padding"
    positions: torch.Tensor | None
    "[last - first] position of each token in the padded block"
    mask: torch.Tensor | None
    "[S, 1, LENGTH_STEP] for the last keys, the only ones with padding: 0 for tokens, minus infinity for padding"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """Offsets of a packed batch's sequences, in the form that the attention in use needs."""

    kernel: AttentionKernel
    blocks: tuple[Block, ...]
    "of `matmul`"
    groups: tuple[tuple[int, int, int], ...]
    "of `flash`: neighbours of equal length as (index of the first token, sequences, tokens of each)"
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
    max_scores = BLOCK_SCORES[device.type] // num_heads
    blocks = plan_blocks(np.diff(cu_seqlens), max_scores=max_scores) if kernel == "matmul" else []
    return SequenceLayout(
        kernel=kernel,
        blocks=tuple(_build_block(cu_seqlens, *block, device=device, dtype=dtype) for block in blocks),
        groups=tuple(group_equal(cu_seqlens)) if kernel == "flash" else (),
        cu_seqlens=borders,
        num_sequences=len(cu_seqlens) - 1,
        max_seqlen=max_seqlen,
        num_tokens=int(cu_seqlens[-1]),
    )


def group_equal(cu_seqlens: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """Return neighbours of equal length as (index of the first token, sequences, tokens of each)."""
    lengths = np.diff(cu_seqlens)
    return [(int(cu_seqlens[first]), last - first, int(lengths[first])) for first, last in find_stretches(lengths)]


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


def plan_blocks(lengths: NDArray[np.int32], *, max_scores: int) -> list[tuple[int, int, int]]:
    """Return the blocks of sequences: (first sequence, last + 1, L) each.

    Neighbours whose lengths round up to the same L share a block. Its size is a power of two, with at most `max_scores`
    scores a head, but at least one sequence.
    """
    padded = -(-lengths.astype(np.int64) // LENGTH_STEP) * LENGTH_STEP
    blocks = []
    for first, last in find_stretches(padded):
        length = int(padded[first])
        limit = max(1, max_scores // length**2)
        while first < last:
            count = 1 << (min(last - first, limit).bit_length() - 1)
            blocks.append((first, first + count, length))
            first += count  # noqa: PLW2901  the rest
    return blocks


def _build_block(
    cu_seqlens: NDArray[np.int32], first: int, last: int, length: int, *, device: torch.device, dtype: torch.dtype
) -> Block:
    begins = cu_seqlens[first:last].astype(np.int64)
    lengths = np.diff(cu_seqlens[first : last + 1]).astype(np.int64)
    token = np.arange(length)
    real = token < lengths[:, None]
    tokens = positions = mask = None
    if not real.all():
        # Padding repeats a token of the same sequence: NaN stays in its sequence.
        padded = begins[:, None] + np.minimum(token, lengths[:, None] - 1)
        tokens, positions, ends = send(device, padded.reshape(-1), np.flatnonzero(real), lengths)
        is_padding = torch.arange(length - LENGTH_STEP, length, device=device) >= ends[:, None]
        mask = torch.zeros(is_padding.shape, dtype=dtype, device=device).masked_fill_(is_padding, -math.inf)[:, None]
    return Block(
        first=int(begins[0]),
        last=int(cu_seqlens[last]),
        sequences=last - first,
        length=length,
        tokens=tokens,
        positions=positions,
        mask=mask,
    )


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
    for first, count, length in layout.groups:
        span = slice(first, first + count * length)
        q, k, v = qkv[span].view(count, length, 3, num_heads, head_width).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out[span] = attended.reshape(-1, num_heads, head_width)
    by_head = qkv.permute(1, 2, 0, 3)
    for block in layout.blocks:
        span = slice(block.first, block.last)
        gathered = by_head[:, :, span].contiguous() if block.tokens is None else by_head.index_select(2, block.tokens)
        shape = (3, num_heads * block.sequences, block.length, head_width)
        attended = _attend_block(gathered.view(shape), block, num_heads=num_heads)
        attended = attended.view(num_heads, -1, head_width).transpose(0, 1)
        if block.positions is not None:
            attended = attended.contiguous().index_select(0, block.positions)
        out[span] = attended
    return out.view(num_tokens, num_heads * head_width)


def _attend_block(qkv: torch.Tensor, block: Block, *, num_heads: int) -> torch.Tensor:
    """Return [H * S, L, D] from queries, keys and values [3, H * S, L, D], a slice of the queries at a time."""
    out = torch.empty_like(qkv[0])
    zero, scale = qkv.new_zeros(1, 1, 1), qkv.shape[-1] ** -0.5
    heads, rows = plan_slices(block, num_heads=num_heads, max_scores=HELD_SCORES[qkv.device.type])
    step = heads * block.sequences
    for first in range(0, num_heads * block.sequences, step):
        q, k, v = qkv[:, first : first + step]
        for start in range(0, block.length, rows):
            scores = torch.baddbmm(zero, q[:, start : start + rows], k.transpose(1, 2), beta=0, alpha=scale)
            if block.mask is not None:
                last_keys = scores.view(-1, block.sequences, scores.shape[1], block.length)[..., -LENGTH_STEP:]
                last_keys.add_(block.mask)
            out[first : first + step, start : start + rows] = torch.bmm(torch.softmax(scores, -1), v)
    return out


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

"""Attention over packed sequences: every token sees exactly the tokens of its own sequence.

Two ways to the same numbers. On CUDA stock torch's variable-length flash attention takes `cu_seqlens` as they are. On
a CPU, and wherever that kernel does not take the dtype, sequences of nearly equal length, which a length-sorted batch
has side by side, are gathered into one [H, S, L, D] block and go through two batched matmuls and a softmax. L is a
multiple of LENGTH_STEP and S a power of two, so that few shapes occur, for each of which oneDNN keeps a kernel.

Why not `scaled_dot_product_attention`: its CPU kernel reached 54 of 440 GFLOP/s at 80 tokens and 80 at 2,560 on one
AVX512-BF16 core, the matmuls 105 and 270, and it wants one length a call. Scores are rounded to the states' dtype, as
in transformers' eager attention; sums inside matmul and softmax are float32.

Shapes: N tokens, H heads, S sequences of a block, L its padded length, D width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.encoder.transfer import send

LENGTH_STEP = 16
"tokens; lengths within it share a block and are padded to its end, for attention only"
BLOCK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
"scores [H, S, L, L] of a block, unless it is a single sequence"
HELD_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""scores that are held at once: on a CPU what stays in the second level cache. Of a long sequence few heads go together
and many of their queries, so that keys and values stay there too: all heads at once, 64 queries at a time, took 1.3
times as long at 2,600 tokens, where each run of queries fetched 10 MB of keys and values anew"""
LEAST_QUERIES = 64
"of a sequence that go together, however many scores that is: fewer make slow matmuls"

_VARLEN_DTYPES = (torch.float16, torch.bfloat16)
_VARLEN_WIDTHS = range(8, 257, 8)
_VARLEN_SEQUENCES = 65_535
"the kernel has one row of its grid for each, and CUDA has no more rows than this"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some neighbouring sequences of a batch, attended to at once."""

    first: int
    "token where they begin"
    last: int
    "token behind them"
    sequences: int
    "S"
    length: int
    "L"
    places: torch.Tensor | None
    "[S * L] the token that stands at each place, padding being the last token again; None: no padding"
    kept: torch.Tensor | None
    "[last - first] the place of each token"
    mask: torch.Tensor | None
    "[S, 1, LENGTH_STEP] of the last keys, before which there is no padding: 0 for tokens, minus infinity for padding"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """Where the sequences of a packed batch lie, in the form that the attention in use wants."""

    blocks: tuple[Block, ...]
    "none where `varlen`"
    cu_seqlens: torch.Tensor
    "[S + 1] int32 on the device, S >= B: behind the batch's own borders may stand the last one again (see pad_borders)"
    num_sequences: int
    "B"
    max_seqlen: int
    num_tokens: int
    "of the sequences; what stands behind them is filling"
    varlen: bool

    @property
    def borders(self) -> torch.Tensor:
        """[B + 1] where the batch's sequences begin and the last ends."""
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
    """Prepare a batch's layout once for all layers; `borders` are its `cu_seqlens` on the device, padded or not."""
    device = borders.device
    varlen = len(borders) - 1 <= _VARLEN_SEQUENCES and takes_varlen(device, dtype, head_width=head_width)
    most_scores = BLOCK_SCORES[device.type] // num_heads
    planned = [] if varlen else plan_blocks(np.diff(cu_seqlens), most_scores=most_scores)
    return SequenceLayout(
        blocks=tuple(_lay_out_block(cu_seqlens, *block, device=device, dtype=dtype) for block in planned),
        cu_seqlens=borders,
        num_sequences=len(cu_seqlens) - 1,
        max_seqlen=max_seqlen,
        num_tokens=int(cu_seqlens[-1]),
        varlen=varlen,
    )


def pad_borders(cu_seqlens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Repeat the last border until a power of two of sequences is there, so that few shapes occur on CUDA.

    A sequence of no tokens is one that flash attention's blocks leave at their first line; without a sequence of their
    own the filling tokens cost no attention.
    """
    num_sequences = len(cu_seqlens) - 1
    padded = min(1 << (num_sequences - 1).bit_length(), max(num_sequences, _VARLEN_SEQUENCES))
    return np.pad(cu_seqlens, (0, padded - num_sequences), mode="edge")


def plan_blocks(lengths: NDArray[np.int32], *, most_scores: int) -> list[tuple[int, int, int]]:
    """Cut sequences into blocks (first sequence, last + 1, L).

    Neighbours whose lengths round up to the same L share a block: a power of two of them, with at most `most_scores`
    scores a head, but at least one.
    """
    padded = -(-lengths.astype(np.int64) // LENGTH_STEP) * LENGTH_STEP
    borders = [0, *(np.flatnonzero(np.diff(padded)) + 1).tolist(), len(lengths)]
    blocks = []
    for first, last in pairwise(borders):
        length = int(padded[first])
        most = max(1, most_scores // length**2)
        while first < last:
            count = 1 << (min(last - first, most).bit_length() - 1)
            blocks.append((first, first + count, length))
            first += count  # noqa: PLW2901  the run is eaten up from its front
    return blocks


def _lay_out_block(
    cu_seqlens: NDArray[np.int32], first: int, last: int, length: int, *, device: torch.device, dtype: torch.dtype
) -> Block:
    begins = cu_seqlens[first:last].astype(np.int64)
    lengths = np.diff(cu_seqlens[first : last + 1]).astype(np.int64)
    token = np.arange(length)
    real = token < lengths[:, None]
    places = kept = mask = None
    if not real.all():
        # Padding is a token of the same sequence: what is no number in one sequence stays there.
        stands = begins[:, None] + np.minimum(token, lengths[:, None] - 1)
        places, kept, ends = send(device, stands.reshape(-1), np.flatnonzero(real), lengths)
        beyond = torch.arange(length - LENGTH_STEP, length, device=device) >= ends[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, -math.inf)[:, None]
    return Block(
        first=int(begins[0]),
        last=int(cu_seqlens[last]),
        sequences=last - first,
        length=length,
        places=places,
        kept=kept,
        mask=mask,
    )


def attend(qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Attend within each sequence.

    Args:
        qkv: [N, 3, H, D] queries, keys and values.
        layout: the batch's layout.

    Returns:
        [N, H * D]
    """
    if layout.varlen:
        return _attend_varlen(qkv, layout)
    num_tokens, _, num_heads, head_width = qkv.shape
    out = torch.empty((num_tokens, num_heads, head_width), dtype=qkv.dtype, device=qkv.device)
    out[layout.num_tokens :] = 0  # filling, see TOKEN_STEP
    by_head = qkv.permute(1, 2, 0, 3)
    for block in layout.blocks:
        run = slice(block.first, block.last)
        gathered = by_head[:, :, run].contiguous() if block.places is None else by_head.index_select(2, block.places)
        shape = (3, num_heads * block.sequences, block.length, head_width)
        attended = _attend_block(gathered.view(shape), block, num_heads=num_heads)
        attended = attended.view(num_heads, -1, head_width).transpose(0, 1)
        out[run] = attended if block.kept is None else attended.contiguous().index_select(0, block.kept)
    return out.view(num_tokens, num_heads * head_width)


def _attend_block(qkv: torch.Tensor, block: Block, *, num_heads: int) -> torch.Tensor:
    """Return [H * S, L, D] of queries, keys and values [3, H * S, L, D], a run of queries at a time."""
    out = torch.empty_like(qkv[0])
    zero, scale = qkv.new_zeros(1, 1, 1), qkv.shape[-1] ** -0.5
    heads, rows = plan_runs(block, num_heads=num_heads, most_scores=HELD_SCORES[qkv.device.type])
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


def plan_runs(block: Block, *, num_heads: int, most_scores: int) -> tuple[int, int]:
    """Return how many heads of a block, and how many queries of each, go together within `most_scores` scores."""
    to_queries = most_scores // (block.sequences * block.length)
    rows = min(block.length, max(LEAST_QUERIES, to_queries // LENGTH_STEP * LENGTH_STEP))
    return max(1, min(num_heads, to_queries // rows)), rows


def _attend_varlen(qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  not in every torch we run on

    # Of tokens behind the last sequence (filling) the kernel writes nothing: whatever stands there, a number or none,
    # stays in its row until the heads leave it out.
    q, k, v = qkv.unbind(1)
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    assert isinstance(out, torch.Tensor)
    return out.reshape(qkv.shape[0], -1)


def takes_varlen(device: torch.device, dtype: torch.dtype, *, head_width: int) -> bool:
    """Whether variable-length flash attention runs here: a GPU of compute capability 8.0 or later, a torch that has it.

    It takes float16 and bfloat16, and heads that are a multiple of 8 and at most 256 wide.
    """
    if device.type != "cuda" or dtype not in _VARLEN_DTYPES or head_width not in _VARLEN_WIDTHS:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True

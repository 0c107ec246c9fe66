"""Attention over packed sequences: every token sees exactly the tokens of its own sequence, nothing is padded.

Two ways to the same numbers. On CUDA stock torch's variable-length flash attention takes `cu_seqlens` as they are. On
a CPU, and wherever that kernel does not take the dtype, equal lengths, which a length-sorted batch has side by side,
go through `scaled_dot_product_attention` as one [B, H, L, D] call a length.

Shapes: N tokens, H heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from numpy.typing import NDArray

_VARLEN_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLayout:
    """Where the sequences of a packed batch lie, in the form that the attention in use wants."""

    groups: tuple[tuple[int, int, int], ...]
    "(first token, sequences, length) of each run of equally long sequences"
    cu_seqlens: torch.Tensor
    "[B + 1] int32 on the device"
    max_seqlen: int
    num_tokens: int
    "of the sequences; what stands behind them is filling"
    varlen: bool


def lay_out(
    cu_seqlens: NDArray[np.int32], *, max_seqlen: int, device: torch.device, dtype: torch.dtype
) -> SequenceLayout:
    """Prepare a batch's layout once for all layers."""
    return SequenceLayout(
        groups=tuple(group_lengths(cu_seqlens)),
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device, non_blocking=True),
        max_seqlen=max_seqlen,
        num_tokens=int(cu_seqlens[-1]),
        varlen=device.type == "cuda" and dtype in _VARLEN_DTYPES and _has_varlen(),
    )


def group_lengths(cu_seqlens: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """Return (first token, sequences, length) of each run of equally long sequences."""
    lengths = np.diff(cu_seqlens)
    borders = np.flatnonzero(np.diff(lengths)) + 1
    firsts = np.concatenate(([0], borders))
    lasts = np.concatenate((borders, [len(lengths)]))
    return [
        (int(cu_seqlens[first]), int(last - first), int(lengths[first]))
        for first, last in zip(firsts, lasts, strict=True)
    ]


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
    for first, count, length in layout.groups:
        last = first + count * length
        # [3, B, H, L, D]
        q, k, v = qkv[first:last].view(count, length, 3, num_heads, head_width).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        out[first:last].view(count, length, num_heads, head_width).copy_(attended.transpose(1, 2))
    return out.view(num_tokens, num_heads * head_width)


def _attend_varlen(qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  not in every torch we run on

    q, k, v = qkv.unbind(1)  # tokens behind the last sequence (filling) are left as the kernel finds them
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    assert isinstance(out, torch.Tensor)
    return out.reshape(qkv.shape[0], -1)


def _has_varlen() -> bool:
    """Whether this torch has the kernel and the GPU can run flash attention (compute capability 8.0 and later)."""
    if torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.encoder import attention
from m3cli.encoder.attention import LENGTH_STEP, SequenceLayout, attend, lay_out, pad_borders, plan_blocks
from m3cli.encoder.device import AttentionKernel

KERNELS: tuple[AttentionKernel, ...] = ("flash", "matmul")
"those of a CPU"
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True))


def to_borders(lengths: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def lay(borders: np.ndarray, *, max_seqlen: int, kernel: AttentionKernel) -> SequenceLayout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose_attention", lambda *_, **__: kernel)
        return lay_out(
            borders, torch.from_numpy(borders), num_heads=2, head_width=8, max_seqlen=max_seqlen, dtype=torch.float32
        )


def attend_one_by_one(qkv: torch.Tensor, borders: np.ndarray) -> torch.Tensor:
    out = []
    for first, last in pairwise(borders):
        q, k, v = qkv[first:last].double().permute(1, 2, 0, 3)
        scores = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
        out.append((scores @ v).transpose(0, 1).reshape(last - first, -1))
    return torch.cat(out)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=40)
@given(
    lengths=LENGTHS,
    max_scores=st.integers(1, 40_000),
    max_bytes=st.integers(1, 400_000),
    max_held=st.integers(1, 160_000),
)
def test_attention_equals_one_sequence_after_the_other(
    lengths: list[int], max_scores: int, max_bytes: int, max_held: int, kernel: AttentionKernel
) -> None:
    borders = to_borders(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(int(borders[-1]) + 3, 3, 2, 8, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.BLOCK_SCORES, "cpu", max_scores)
        patch.setitem(attention.BLOCK_BYTES, "cpu", max_bytes)
        patch.setitem(attention.HELD_BYTES, "cpu", max_held)
        patch.setattr(attention, "MIN_QUERIES", LENGTH_STEP)
        layout = lay(borders, max_seqlen=lengths[0], kernel=kernel)
        out = attend(qkv, layout)
    assert torch.allclose(out[: borders[-1]].double(), attend_one_by_one(qkv, borders), atol=1e-5)
    assert not out[borders[-1] :].any()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8192), min_size=1, max_size=200),
    max_scores=st.integers(1, 1 << 20),
    max_tokens=st.integers(1, 1 << 14),
)
def test_blocks_hold_every_sequence_once_in_few_shapes(lengths: list[int], max_scores: int, max_tokens: int) -> None:
    borders = to_borders(lengths)
    blocks = plan_blocks(borders, max_scores=max_scores, max_tokens=max_tokens)
    groups = [group for block in blocks for group in block.groups]
    held = [group.length for group in groups for _ in range(group.rows.start, group.rows.stop)]
    assert held == lengths
    assert [group.span for group in groups] == [
        slice(*pair) for pair in pairwise([*(g.span.start for g in groups), borders[-1]])
    ]
    for block in blocks:
        count, length = block.sequences, block.length
        assert count == block.groups[-1].rows.stop
        assert count & (count - 1) == 0
        assert length % LENGTH_STEP == 0
        assert count == 1 or (count * length**2 <= max_scores and count * length <= max_tokens)
        assert all(length - LENGTH_STEP < group.length <= length for group in block.groups)


@settings(deadline=None, max_examples=40)
@given(LENGTHS)
def test_a_cpu_softmax_gives_the_same_numbers_in_float32(lengths: list[int]) -> None:
    borders = to_borders(lengths)
    qkv = torch.randn(int(borders[-1]), 3, 2, 8, generator=torch.Generator().manual_seed(len(lengths))).bfloat16()
    layout = lay(borders, max_seqlen=lengths[0], kernel="matmul")
    widened = attend(qkv, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WIDENED_KEYS", 0)
        assert torch.equal(widened.view(torch.int16), attend(qkv, layout).view(torch.int16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_in_its_sequence(kernel: AttentionKernel) -> None:
    borders = to_borders([20, 19, 18, 3])
    qkv = torch.randn(60, 3, 2, 8)
    qkv[25] = torch.nan
    layout = lay(borders, max_seqlen=20, kernel=kernel)
    out = attend(qkv, layout)
    assert out[20:39].isnan().any(-1).all()
    assert out[:20].isfinite().all()
    assert out[39:].isfinite().all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=70))
def test_padded_borders_add_sequences_of_no_tokens(lengths: list[int]) -> None:
    borders = to_borders(lengths)
    padded = pad_borders(borders)
    count = len(padded) - 1
    assert count & (count - 1) == 0
    assert len(lengths) <= count < 2 * len(lengths)
    assert padded.dtype == np.int32
    assert padded[: len(borders)].tolist() == borders.tolist()
    assert not np.diff(padded[len(borders) - 1 :]).any()


def test_borders_are_not_padded_past_what_cuda_takes() -> None:
    assert len(pad_borders(np.arange(40_001, dtype=np.int32))) - 1 == 65_535
    assert len(pad_borders(np.arange(70_001, dtype=np.int32))) - 1 == 70_000

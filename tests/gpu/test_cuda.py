"""The CUDA path against the CPU's float32; skips itself where there is no CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch

from tests.conftest import Completed, build_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture
def corpus() -> Path:
    return build_sample()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cuda_gives_the_vectors_of_the_cpu(
    dtype: str, corpus: Path, tiny_m3: Path, tmp_path: Path, m3: Callable[..., Completed]
) -> None:
    common = [corpus, "--model", tiny_m3, "--limit", 300, "--dense-dtype", "float32"]
    assert m3("encode", *common, "--out", "cpu.m3", "--device", "cpu", "--dtype", "float32").returncode == 0
    assert m3("encode", *common, "--out", "cuda.m3", "--device", "cuda", "--dtype", dtype).returncode == 0
    cpu, cuda = (ds.dataset(tmp_path / f"{name}.m3" / "rows").to_table() for name in ("cpu", "cuda"))
    assert cpu["id"] == cuda["id"]
    dense = [np.array(table["dense_vecs"].to_pylist()) for table in (cpu, cuda)]
    assert (dense[0] * dense[1]).sum(1).min() > 0.999
    width = dense[0].shape[1]
    for one, other in zip(cpu["colbert_vecs"].to_pylist(), cuda["colbert_vecs"].to_pylist(), strict=True):
        vectors = [np.frombuffer(raw, np.float16).reshape(-1, width).astype(np.float32) for raw in (one, other)]
        assert (vectors[0] * vectors[1]).sum(1).mean() > 0.999


def test_auto_takes_the_gpu_in_float16(corpus: Path, tiny_m3: Path, m3: Callable[..., Completed]) -> None:
    shown = m3("plan", corpus, "--model", tiny_m3)
    assert "float16 on cuda" in shown.stdout

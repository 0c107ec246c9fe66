"""The machine's own matmul rates: [4096 x 1024] . [1024 x 4096], the shape of BGE-M3's widest one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ROWS, WIDTH, COLUMNS = 4096, 1024, 4096
ROUNDS = 12
GPU_TIMES = 50
"matmuls between two waits for a GPU, each of which takes some 50 µs there"
INT8_ROWS = 1024
"""at once; the operator makes its own output, and from 32 MiB on glibc maps fresh pages for it every time"""


@torch.inference_mode()
def measure_rates(device: str) -> dict[str, float]:
    """Return FLOP/s by dtype, the best of some rounds; the output's pages are there beforehand."""
    if device != "cpu":
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return {
            name: _rate(_prepare(dtype, device, times=GPU_TIMES), times=GPU_TIMES) for name, dtype in dtypes.items()
        }
    return {name: _rate(_prepare(getattr(torch, name), device)) for name in ("float32", "bfloat16")} | (
        {"int8": _rate(_prepare_int8())} if _has_int8() else {}
    )


def _rate(run: Callable[[], object], *, times: int = 1) -> float:
    best = 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        best = max(best, 2.0 * times * ROWS * WIDTH * COLUMNS / (time.perf_counter() - began))
    return best


def _prepare(dtype: torch.dtype, device: str, *, times: int = 1) -> Callable[[], object]:
    left = torch.randn(ROWS, WIDTH, device=device).to(dtype)
    right = torch.randn(WIDTH, COLUMNS, device=device).to(dtype)
    out = torch.zeros(ROWS, COLUMNS, dtype=dtype, device=device)

    def run() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)
        if device != "cpu":
            torch.cuda.synchronize(device)

    return run


def _has_int8() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")  # type: ignore[no-untyped-call]


def _prepare_int8() -> Callable[[], object]:
    """Multiply unsigned by signed bytes into bfloat16, as m3's `--dtype int8` does."""
    left = torch.randint(0, 255, (ROWS, WIDTH), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(
        torch.randint(-127, 127, (COLUMNS, WIDTH), dtype=torch.int8), [INT8_ROWS, WIDTH]
    )
    scale, zero = torch.ones(COLUMNS), torch.zeros(COLUMNS, dtype=torch.int32)

    def run() -> None:
        for rows in torch.split(left, INT8_ROWS):
            torch.ops.onednn.qlinear_pointwise(
                rows, 1.0, 128, weight, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

    return run

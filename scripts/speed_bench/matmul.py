"""The machine's own matmul rates: [4096 x 1024] . [1024 x 4096], the shape of BGE-M3's widest one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ROWS, WIDTH, COLUMNS = 4096, 1024, 4096
ROUNDS = 12
INT8_ROWS = 1024
"""at once; the operator makes its own output, and from 32 MiB on glibc maps fresh pages for it every time"""


@torch.inference_mode()
def measure_rates() -> dict[str, float]:
    """Return FLOP/s by dtype, the best of some rounds; the output's pages are there beforehand."""
    return {"float32": _rate(_prepare(torch.float32)), "bfloat16": _rate(_prepare(torch.bfloat16))} | (
        {"int8": _rate(_prepare_int8())} if _has_int8() else {}
    )


def _rate(run: Callable[[], object]) -> float:
    best = 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        best = max(best, 2.0 * ROWS * WIDTH * COLUMNS / (time.perf_counter() - began))
    return best


def _prepare(dtype: torch.dtype) -> Callable[[], object]:
    left, right = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(WIDTH, COLUMNS).to(dtype)
    out = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    return lambda: torch.mm(left, right, out=out)


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

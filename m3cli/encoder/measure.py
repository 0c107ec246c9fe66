"""What this machine can do, as far as encoding goes: devices, dtypes in hardware, and measured matmul rates.

A rate is of [4096 x 1024] x [1024 x 4096], the shape of BGE-M3's widest matmul over a batch of 4,096 tokens.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from m3cli.config import Dtype
from m3cli.encoder.attention import takes_varlen
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.device import BFLOAT16, FLOAT16, INT8, auto_threads, cpu_has, state_dtype

_ROWS, _WIDTH, _COLUMNS = 4096, 1024, 4096
_SECONDS = 0.4
"that a rate is measured for, if its rounds are done by then"
_ROUNDS = 4
"at least, the first of which warms up"
_LONGEST_ROUND = 3.0
"seconds that a round may take"
_PACKED_SHARE = 0.85
"of the matmul rate that packed encoding reached: 337 of 396 GFLOP/s in bfloat16 on the CPU of DESIGN, section 8"
_HEAD_WIDTH = 64
"of BGE-M3 and all XLM-RoBERTa"


def list_devices() -> list[dict[str, Any]]:
    """Describe the CPU and each GPU; memory in bytes."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _name_cpu(),
            "cores": _count_cores(),
            "threads": auto_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "hardware_dtypes": _cpu_dtypes(),
        }
    ]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": f"cuda:{number}",
                "name": about.name,
                "memory_bytes": about.total_memory,
                "compute_capability": f"{about.major}.{about.minor}",
                "hardware_dtypes": ["float32", "float16", *(["bfloat16"] if about.major >= 8 else [])],
            }
        )
    return found


def name_attention(device: str, dtype: Dtype) -> str:
    """Say which attention a device would use with a dtype."""
    varlen = takes_varlen(torch.device(device), state_dtype(dtype), head_width=_HEAD_WIDTH)
    return "variable-length flash attention" if varlen else "batched matmuls, one block a length"


@torch.inference_mode()
def measure_matmul(device: str, dtype: Dtype) -> float:
    """Return FLOP/s of the best of a few rounds; of a smaller matmul where one round would take seconds.

    A dtype that is not in hardware can be a thousand times slower: float16 on a CPU without it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other would make any small matmul slow
    try:
        small = threads * _time_matmul(device, dtype, rows=_ROWS // 16, columns=_COLUMNS // 16, seconds=_SECONDS / 4)
    finally:
        torch.set_num_threads(threads)
    if device == "cpu" and small * _LONGEST_ROUND < 2.0 * _ROWS * _WIDTH * _COLUMNS:
        return small
    return _time_matmul(device, dtype, rows=_ROWS, columns=_COLUMNS, seconds=_SECONDS)


def _time_matmul(device: str, dtype: Dtype, *, rows: int, columns: int, seconds: float) -> float:
    """Return FLOP/s of [rows x 1024] x [1024 x columns], the best of the rounds after the first."""
    kind, place = getattr(torch, dtype), torch.device(device)
    left = torch.randn(rows, _WIDTH, device=place).to(kind)
    right = torch.randn(_WIDTH, columns, device=place).to(kind)
    rounds: list[float] = []
    while len(rounds) < _ROUNDS or sum(rounds[1:]) < seconds:
        start = time.perf_counter()
        torch.mm(left, right)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        rounds.append(time.perf_counter() - start)
    return 2.0 * rows * _WIDTH * columns / min(rounds[1:])


def count_flops(checkpoint: Checkpoint, *, intermediate_size: int, length: int) -> float:
    """Return FLOP a token of a text of `length` tokens: matmuls of all layers, attention, ColBERT head."""
    width = checkpoint.hidden_size
    layer = 8 * width * width + 4 * width * intermediate_size + 4 * length * width
    head = 2 * width * width if "colbert" in checkpoint.outputs else 0
    return float(checkpoint.num_layers * layer + head)


def expect_tokens_per_second(flops_per_second: float, flops_per_token: float) -> float:
    """Return the tokens/s that packed encoding should reach."""
    return _PACKED_SHARE * flops_per_second / flops_per_token


def _name_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_dtypes() -> list[str]:
    sets = {"bfloat16": BFLOAT16, "float16": FLOAT16, "int8": INT8}
    return ["float32", *(name for name, names in sets.items() if cpu_has(names))]

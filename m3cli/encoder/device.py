"""The device: what `auto` resolves to on this machine, copies to it and back, its matmul rate.

The dtype is float16 on CUDA, bfloat16 on a CPU that has it in hardware, float32 elsewhere. int8 is never automatic,
because its vectors differ slightly.

Copies are asynchronous until the outputs are read. On CUDA both directions use pinned memory, because a copy from
pageable memory blocks. Output arrays are views of pinned memory and own it. It is not copied to pageable memory, which
would take longer than the device's copy. torch reuses the block after the last view is freed. On a CPU nothing is
copied.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.config import Dtype
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.linear import can_run_int8, can_run_nf4
from m3cli.errors import ModelTooLarge, UsageError

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
FLOAT16 = ("avx512_fp16", "amx_fp16", "fp16_arith")
INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm")
"instruction sets that multiply a dtype"
_CPU_BATCH_TOKENS = 4096
"twice as many would need new memory pages in each layer: see INNER_ROWS in model.py"
MAX_PARALLEL = 4
"""batches at once, each with activations of some 100 MiB; fixed, because the threads of a batch may decide the last bit
of a sum, and so a folder's bytes"""
_GPU_BATCH_TOKENS = ((40 << 30, 65536), (20 << 30, 32768), (0, 16384))
"(bytes of GPU memory from, tokens)"
_VARLEN_DTYPES = (torch.float16, torch.bfloat16)
_VARLEN_WIDTHS = range(8, 257, 8)


def resolve_device(device: str | None) -> str:
    """Return 'cpu' or 'cuda[:i]'; `auto` (None) takes a GPU if there is one.

    Raises:
        UsageError: the GPU does not exist.
    """
    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    assert device is not None
    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return device
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def auto_dtype(device: str) -> Dtype:
    """Return the fastest dtype that keeps the model's quality on a device."""
    if device.startswith("cuda"):
        return "float16"
    return "bfloat16" if cpu_has(BFLOAT16) else "float32"


def resolve_dtype(dtype: Dtype | None, device: str) -> Dtype:
    """Return `dtype`, or the automatic one of a device (None).

    Raises:
        UsageError: int8 or nf4 cannot run here.
    """
    if dtype == "int8" and device.startswith("cuda"):
        raise UsageError(f"--dtype int8 runs on a CPU only, not on {device}; use float16 there, or --device cpu")
    if dtype == "int8" and not can_run_int8():
        raise UsageError(f"--dtype int8: torch {torch.__version__} comes without oneDNN here; use --dtype float32")
    if dtype == "int8" and not cpu_has(INT8):
        raise UsageError(
            "--dtype int8: this CPU has no VNNI instructions, and 8-bit products overflow in oneDNN without them; "
            "use --dtype float32"
        )
    if dtype == "nf4" and not can_run_nf4():
        raise UsageError("--dtype nf4 needs the package bitsandbytes: pip install 'm3cli[nf4]'")
    return dtype or auto_dtype(device)


def state_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """Return the dtype of hidden states: with int8 and nf4, which are forms of weights, the device's automatic one."""
    found: torch.dtype = getattr(torch, auto_dtype(device) if dtype in ("int8", "nf4") else dtype)
    return found


def is_emulated(dtype: torch.dtype, device: str) -> bool:
    """Return whether a CPU has no instructions to multiply a dtype, so that float32 is faster."""
    names = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}.get(dtype)
    return names is not None and not device.startswith("cuda") and not cpu_has(names)


def auto_batch_tokens(device: str) -> int:
    """Return the tokens of a batch that keep the device busy and leave memory for the longest chunk."""
    if not device.startswith("cuda"):
        return _CPU_BATCH_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory
    return next(tokens for least, tokens in _GPU_BATCH_TOKENS if memory >= least)


def auto_threads() -> int:
    """Return torch's default: the physical cores that it may use."""
    return torch.get_num_threads()


def set_threads(threads: int) -> None:
    """Set the threads of a matmul on a CPU."""
    torch.set_num_threads(threads)


def plan_threads(threads: int, *, device: str) -> int:
    """Return how many batches go through the model at once, each with an equal share of the threads.

    Between matmuls a batch has work for one thread (packing, layout, parts of the heads), and other batches use the
    cores. On a GPU the next batch is launched ahead instead.
    """
    if device.startswith("cuda"):
        return 1
    return next(count for count in range(MAX_PARALLEL, 0, -1) if count <= threads and threads % count <= 1)


def lacks_memory(error: Exception) -> bool:
    """Return whether an error is a lack of memory: an own class for a GPU, recognised by its text for a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, ModelTooLarge)):
        return True
    # "... DefaultCPUAllocator: can't allocate memory ...", "unable to mmap ...: Cannot allocate memory (12)"
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def peak_device_bytes(device: str) -> int:
    """Return the peak of allocated GPU memory; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0


def cpu_has(names: Collection[str]) -> bool:
    """Return whether the CPU has one of the instruction sets, by torch's names."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in names)


def takes_varlen(device: torch.device, dtype: torch.dtype, *, head_width: int) -> bool:
    """Return whether variable-length flash attention runs: compute capability 8.0 or later, and a torch that has it.

    It needs float16 or bfloat16, and heads whose width is a multiple of 8 and at most 256.
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


ALIGNMENT = 32
"int32 numbers, 128 bytes: arrays in one copy begin at multiples of it, as kernels prefer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Tensors that are being copied to the host."""

    tensors: Mapping[str, torch.Tensor]
    "on the host; readable after `ready`"
    ready: torch.cuda.Event | None
    "None: no copy"

    def wait(self) -> dict[str, NDArray[Any]]:
        """Wait for the copies and return them as arrays that own their memory."""
        if self.ready is not None:
            self.ready.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def send(device: torch.device, *arrays: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    """Return integer arrays as int32 tensors on a device, sent in one copy."""
    begins = np.cumsum([0, *(-(-len(array) // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    # torch does not reuse a freed pinned block before its copy is done.
    packed = torch.empty(begins[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    into = packed.numpy()
    for begin, array in zip(begins[:-1], arrays, strict=True):
        into[begin : begin + len(array)] = array
    sent = packed.to(device, non_blocking=True)
    return tuple(sent[begin : begin + len(array)] for begin, array in zip(begins[:-1], arrays, strict=True))


def open_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies that run in parallel with kernels; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def fetch(tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream | None) -> Fetched:
    """Start to copy tensors to the host after their queued kernels, on a stream of `open_stream`."""
    if stream is None:
        return Fetched(tensors=tensors, ready=None)
    copies = {}
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for name, tensor in tensors.items():
            copies[name] = _allocate(tensor)
            copies[name].copy_(tensor, non_blocking=True)
            # Its memory may be needed by a later batch, whose kernels run on another stream.
            tensor.record_stream(stream)
        # Blocking: the waiting thread sleeps and leaves the core to others.
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record(stream)
    return Fetched(tensors=copies, ready=ready)


def _allocate(tensor: torch.Tensor) -> torch.Tensor:
    """Return pinned memory for a tensor, or pageable memory, whose copy blocks, if there is no more."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return torch.empty(tensor.shape, dtype=tensor.dtype)


_ROWS, _WIDTH, _COLUMNS = 4096, 1024, 4096
_SECONDS = 0.4
"for which a rate is measured"
_ROUNDS = 4
"at least, with one to warm up"
_LONGEST_ROUND = 3.0
"seconds"
_PACKED_SHARE = 0.85
"of the matmul rate, which packed encoding reaches in bfloat16 (scripts/bench_results/README.md)"
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
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "hardware_dtypes": ["float32", "float16", *(["bfloat16"] if properties.major >= 8 else [])],
            }
        )
    return found


def name_attention(device: str, dtype: Dtype) -> str:
    """Return the name of the attention that a device uses with a dtype."""
    varlen = takes_varlen(torch.device(device), state_dtype(dtype, device), head_width=_HEAD_WIDTH)
    return "variable-length flash attention" if varlen else "batched matmuls, one block a length"


@torch.inference_mode()
def measure_matmul(device: str, dtype: Dtype) -> float:
    """Return FLOP/s of the best of a few rounds, of a smaller matmul if a round would take seconds.

    A dtype without hardware support can be a thousand times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting threads slow a small matmul down
    try:
        small = threads * _time_matmul(device, dtype, rows=_ROWS // 16, columns=_COLUMNS // 16, seconds=_SECONDS / 4)
    finally:
        torch.set_num_threads(threads)
    if device == "cpu" and small * _LONGEST_ROUND < 2.0 * _ROWS * _WIDTH * _COLUMNS:
        return small
    return _time_matmul(device, dtype, rows=_ROWS, columns=_COLUMNS, seconds=_SECONDS)


def _time_matmul(device: str, dtype: Dtype, *, rows: int, columns: int, seconds: float) -> float:
    """Return FLOP/s of [rows x 1024] x [1024 x columns], the best of the rounds after the first."""
    kind, target = getattr(torch, dtype), torch.device(device)
    first = torch.randn(rows, _WIDTH, device=target).to(kind)
    second = torch.randn(_WIDTH, columns, device=target).to(kind)
    rounds: list[float] = []
    while len(rounds) < _ROUNDS or sum(rounds[1:]) < seconds:
        start = time.perf_counter()
        torch.mm(first, second)
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        rounds.append(time.perf_counter() - start)
    return 2.0 * rows * _WIDTH * columns / min(rounds[1:])


def count_flops(checkpoint: Checkpoint, *, intermediate_size: int, length: int) -> float:
    """Return the FLOP of one token in a text of `length` tokens: all layers, attention, ColBERT head."""
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

"""The device: what `auto` resolves to on this machine, copies to it and back, its matmul rate.

The dtype is float16 on CUDA, bfloat16 on a CPU that has it in hardware, float32 elsewhere. int8 is never automatic,
because its vectors differ slightly.

Copies are asynchronous until the outputs are read. On CUDA both directions use pinned memory, because a copy from
pageable memory blocks. Output arrays are views of pinned memory and own it. It is not copied to pageable memory, which
would take longer than the device's copy. torch reuses the block after the last view is freed. On a CPU nothing is
copied.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from m3cli.config import Dtype
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.encoder.linear import can_run_int8, can_run_nf4
from m3cli.errors import ModelTooLarge, UsageError

_log = logging.getLogger(__name__)

TORCH_VERSION = str(torch.__version__)

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
FLOAT16 = ("avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp")
INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
"""instruction sets that multiply a dtype, by the names of torch and Linux; not an ARM's i8mm, for which oneDNN 3.7 has
only its reference code (40 times as slow as float32, emulated)"""
AMX = ("amx_tile",)
AttentionKernel = Literal["varlen", "flash", "matmul"]
"see attention.py"
_CPU_BATCH_TOKENS = 4096
"twice as many would need new memory pages in each layer: see INNER_ROWS in model.py"
MAX_PARALLEL = 4
"""batches at once, each with activations of some 100 MiB; fixed, because the threads of a batch may decide the last bit
of a sum, and so a folder's bytes"""
AHEAD = {"cpu": 0, "cuda": 3}
"batches that are launched before the first of them is collected, by device kind"
_GPU_BATCH_TOKENS = ((40 << 30, 65536), (20 << 30, 32768), (0, 16384))
"(bytes of GPU memory from, tokens)"
_NO_MEMORY = (
    "allocate memory",  # DefaultCPUAllocator: can't allocate memory; unable to mmap ...: Cannot allocate memory (12)
    "out of memory",  # torch.AcceleratorError: CUDA error: out of memory (a context, pinned memory, a kernel's module)
    "ALLOC_FAILED",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
)
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
"one of them exists where there is an NVIDIA driver: on Linux, in WSL"
_DRIVER_FILE = "/proc/driver/nvidia/version"
_VARLEN_DTYPES = (torch.float16, torch.bfloat16)
_VARLEN_WIDTHS = range(8, 257, 8)


def resolve_device(device: str | None) -> str:
    """Return 'cpu' or 'cuda[:i]'; `auto` (None) takes a GPU if there is one.

    Raises:
        UsageError: the GPU does not exist.
    """
    if device in (None, "auto"):
        if (reason := _why_no_gpu()) is None:
            return "cuda"
        if reason:
            _warn_once(f"--device auto chooses the CPU: {reason}")
        return "cpu"
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


def _why_no_gpu() -> str | None:
    """Return why torch uses no GPU: "" if the machine shows none; None: it uses one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if not any(Path(name).exists() for name in _GPU_FILES):
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA, and there is an NVIDIA GPU; install a CUDA build"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible} hides the NVIDIA GPU"
    driver = Path(_DRIVER_FILE).read_text(encoding="utf-8") if Path(_DRIVER_FILE).exists() else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", driver)
    said = f" ({str(caught[0].message).splitlines()[0].rstrip('.')})" if caught else ""
    return (
        f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use the NVIDIA GPU with driver "
        f"{found[0] if found else 'unknown'}{said}; update the driver, or install a torch for an older CUDA"
    )


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


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
            "--dtype int8: this CPU has no VNNI instructions, and without them 8-bit products of oneDNN overflow (x86) "
            "or are slower than float32 (ARM); leave --dtype out"
        )
    if dtype == "nf4" and not can_run_nf4():
        raise UsageError("--dtype nf4 needs the package bitsandbytes: pip install 'm3cli[nf4]'")
    return dtype or auto_dtype(device)


def retry_dtypes(dtype: Dtype, device: str) -> tuple[Dtype, ...]:
    """Return the dtypes in which rows that overflow `dtype` are encoded again, in turn.

    bfloat16 has the range of float32 and is as fast as float16 on a GPU; on a CPU with float16 it may be emulated.
    """
    if dtype == "float32":
        return ()
    return ("bfloat16", "float32") if dtype == "float16" and device.startswith("cuda") else ("float32",)


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
    """Return OMP_NUM_THREADS, or torch's default, the physical cores, as far as a container may use them.

    More threads would wait: once they have used up the CPU time of a period, the kernel stops all of them.
    """
    threads: int = torch.get_num_threads()
    limits = [] if os.environ.get("OMP_NUM_THREADS") else read_cpu_limits()
    return math.ceil(min([threads, *limits]))


@cache
def read_cpu_limits(root: Path = Path("/")) -> list[float]:
    """Return the limits, in CPUs, of the control groups that the process is in (Linux, both versions)."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    groups = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        top = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        if not controllers or "cpu" in controllers.split(","):
            # A container may see the path that its host knows; its own files are at the top then.
            groups += [top / group.lstrip("/") for group in (path, *map(str, PurePath(path).parents))]
    return [limit for group in groups if (limit := _read_cpu_limit(group)) is not None]


def _read_cpu_limit(group: Path) -> float | None:
    """Return the limit of one group: the CPU time in a period; `cpu.max` has both in version 2."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError):
            texts = [(group / name).read_text(encoding="utf-8") for name in names]
            quota, period = " ".join(texts).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


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
    """Return whether an error is a lack of memory: by its class, or by the text of a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, ModelTooLarge)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def peak_device_bytes(device: str) -> int:
    """Return the peak of allocated GPU memory; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0


def cpu_has(names: Collection[str]) -> bool:
    """Return whether the CPU has one of the instruction sets; an older torch tells none, then Linux does."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in names)
    return not {*names}.isdisjoint(f"{_read_cpuinfo('flags')} {_read_cpuinfo('Features')}".split())


def choose_attention(device: torch.device, dtype: torch.dtype, *, head_width: int) -> AttentionKernel:
    """Return the attention that is fastest on a device (scripts/bench_results/LOG.md)."""
    if takes_varlen(device, dtype, head_width=head_width):
        return "varlen"
    return "flash" if device.type == "cpu" and cpu_has(AMX) else "matmul"


def takes_varlen(device: torch.device, dtype: torch.dtype, *, head_width: int) -> bool:
    """Return whether variable-length flash attention runs: compute capability 8.0 or later, and a torch that has it.

    It needs float16 or bfloat16, and heads whose width is a multiple of 8 and at most 256.
    """
    if device.type != "cuda" or dtype not in _VARLEN_DTYPES or head_width not in _VARLEN_WIDTHS:
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


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
    packed = _allocate((begins[-1],), torch.int32, pinned=device.type == "cuda")
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
            copies[name] = _allocate(tensor.shape, tensor.dtype, pinned=True)
            copies[name].copy_(tensor, non_blocking=True)
            # Its memory may be needed by a later batch, whose kernels run on another stream.
            tensor.record_stream(stream)
        # Blocking: the waiting thread sleeps and leaves the core to others.
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record(stream)
    return Fetched(tensors=copies, ready=ready)


def _allocate(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Return host memory; pageable memory, whose copies block, if pinned memory is limited or used up."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    except RuntimeError as error:
        if not (pinned and "memory" in str(error)):
            raise
        return torch.empty(shape, dtype=dtype)


_ROWS, _WIDTH, _COLUMNS = 4096, 1024, 4096
_SECONDS = 0.4
"for which a rate is measured"
_ROUNDS = 4
"at least, with one to warm up"
_LONGEST_ROUND = 3.0
"seconds"
_GPU_CALLS = 10
"matmuls of a round on a GPU: one of a millisecond is as long as waiting for it"
_PACKED_SHARE = {"cpu": 0.85, "cuda": 0.6}
"""of the matmul rate, which packed encoding reaches: measured in bfloat16 on a CPU and in float16 on an H100
(scripts/bench_results/README.md)"""
_HEAD_WIDTH = 64
"of BGE-M3 and all XLM-RoBERTa"


def list_devices() -> list[dict[str, Any]]:
    """Describe the CPU and each GPU; memory in bytes."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": name_device("cpu"),
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
    return {
        "varlen": "variable-length flash attention",
        "flash": "flash attention, a call a length",
        "matmul": "batched matmuls, one block a length",
    }[choose_attention(torch.device(device), state_dtype(dtype, device), head_width=_HEAD_WIDTH)]


@torch.inference_mode()
def measure_matmul(device: str, dtype: Dtype) -> float:
    """Return FLOP/s of the best of a few rounds, of a smaller matmul if a round would take seconds.

    A dtype without hardware support can be a thousand times slower. On a GPU the matmul has the rows of a full batch.
    """
    if device != "cpu":
        return time_matmul(device, dtype, rows=auto_batch_tokens(device), calls=_GPU_CALLS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting threads slow a small matmul down
    try:
        small = threads * time_matmul(device, dtype, rows=_ROWS // 16, columns=_COLUMNS // 16, seconds=_SECONDS / 4)
    finally:
        torch.set_num_threads(threads)
    if small * _LONGEST_ROUND < 2.0 * _ROWS * _WIDTH * _COLUMNS:
        return small
    return time_matmul(device, dtype)


def time_matmul(
    device: str,
    dtype: Dtype,
    *,
    rows: int = _ROWS,
    width: int = _WIDTH,
    columns: int = _COLUMNS,
    seconds: float = _SECONDS,
    calls: int = 1,
    best: bool = True,
) -> float:
    """Return FLOP/s of [rows x width] x [width x columns], of the best round after the first, or of all of them.

    A round is some calls and a wait for the device.
    """
    kind, target = getattr(torch, dtype), torch.device(device)
    first = torch.randn(rows, width, device=target).to(kind)
    second = torch.randn(width, columns, device=target).to(kind)
    rounds: list[float] = []
    while len(rounds) < _ROUNDS or sum(rounds[1:]) < seconds:
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(first, second)
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        rounds.append(time.perf_counter() - start)
    spent = min(rounds[1:]) if best else sum(rounds[1:]) / len(rounds[1:])
    return 2.0 * rows * width * columns * calls / spent


def count_flops(checkpoint: Checkpoint, *, intermediate_size: int, length: int) -> float:
    """Return the FLOP of one token in a text of `length` tokens: all layers, attention, ColBERT head."""
    width = checkpoint.hidden_size
    layer = 8 * width * width + 4 * width * intermediate_size + 4 * length * width
    head = 2 * width * width if "colbert" in checkpoint.outputs else 0
    return float(checkpoint.num_layers * layer + head)


def expect_tokens_per_second(flops_per_second: float, flops_per_token: float, *, device: str) -> float:
    """Return the tokens/s that packed encoding should reach."""
    return _PACKED_SHARE[device.partition(":")[0]] * flops_per_second / flops_per_token


def name_device(device: str) -> str:
    """Return the name of a CPU or GPU."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return _read_cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def _read_cpuinfo(key: str) -> str:
    """Return what Linux tells of the first core: its name; its instruction sets are `flags`, on ARM `Features`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_dtypes() -> list[str]:
    sets = {"bfloat16": BFLOAT16, "float16": FLOAT16, "int8": INT8}
    return ["float32", *(name for name, names in sets.items() if cpu_has(names))]

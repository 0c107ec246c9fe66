"""What `auto` resolves to on this machine; copies to a device and back."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder import device
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.device import (
    ALIGNMENT,
    AMX,
    BFLOAT16,
    FLOAT16,
    INT8,
    MAX_PARALLEL,
    _allocate,
    auto_dtype,
    auto_threads,
    cpu_has,
    fetch,
    is_emulated,
    lacks_memory,
    measure_matmul,
    open_stream,
    plan_threads,
    read_cpu_limits,
    resolve_device,
    resolve_dtype,
    retry_dtypes,
    send,
    time_matmul,
)
from m3cli.encoder.linear import can_run_int8
from m3cli.encoder.model import load_model
from m3cli.errors import UsageError

CPU = torch.device("cpu")

ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", RuntimeError)  # torch 2.6 to 2.7 raise RuntimeError


@pytest.mark.parametrize(
    ("threads", "batches"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 3), (7, 3), (8, 4), (32, 4)]
)
def test_batches_share_the_threads(threads: int, batches: int) -> None:
    assert plan_threads(threads, device="cpu") == batches
    assert plan_threads(threads, device="cuda:1") == 1


@given(st.integers(1, 512))
def test_at_most_one_thread_is_idle(threads: int) -> None:
    batches = plan_threads(threads, device="cpu")
    assert 1 <= batches <= MAX_PARALLEL
    assert threads - batches * (threads // batches) <= 1


@pytest.mark.parametrize("has", [{"avx512_bf16": True}, {"avx512_fp16": True}, {"avx512_bf16": False}, {}])
def test_a_dtype_that_is_slower_than_float32_is_told(
    tiny_m3: Path, has: dict[str, bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)  # torch 2.6 has none
    for dtype, name in (("float32", None), ("bfloat16", "avx512_bf16"), ("float16", "avx512_fp16")):
        caplog.clear()
        load_model(read_checkpoint(tiny_m3), device="cpu", dtype=dtype)  # type: ignore[arg-type]
        words = f"{dtype} is not in this CPU's hardware: float32 would be several times faster here"
        assert [record.message for record in caplog.records] == ([] if name is None or has.get(name) else [words])
    assert auto_dtype("cpu") == ("bfloat16" if has.get("avx512_bf16") else "float32")
    assert not is_emulated(torch.float16, "cuda:0")


def test_what_overflows_is_encoded_again_in_a_dtype_with_more_range() -> None:
    assert retry_dtypes("float16", "cuda:1") == ("bfloat16", "float32")
    assert retry_dtypes("float16", "cpu") == retry_dtypes("bfloat16", "cuda") == retry_dtypes("int8", "cpu")
    assert retry_dtypes("bfloat16", "cuda") == ("float32",)
    assert retry_dtypes("float32", "cuda") == ()


@pytest.mark.parametrize("has", [{"avx512_vnni": True}, {"avx2": True}, {"i8mm": True}])
def test_int8_needs_a_cpu_with_vnni(has: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)  # torch 2.6 has none
    if "avx512_vnni" in has and can_run_int8():
        assert resolve_dtype("int8", "cpu") == "int8"
    else:
        with pytest.raises(UsageError, match="--dtype int8: "):
            resolve_dtype("int8", "cpu")


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch tells nothing of the CPU")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_an_old_torch_computes_in_the_same_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = (*BFLOAT16, *FLOAT16, *INT8, *AMX)
    told = {name: cpu_has([name]) for name in sets}
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert {name: cpu_has([name]) for name in sets} == told


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=3 * ALIGNMENT), min_size=1, max_size=5))
def test_arrays_arrive_as_they_were_sent(lists: list[list[int]]) -> None:
    arrays = [np.array(one, np.int64 if index % 2 else np.int32) for index, one in enumerate(lists)]
    sent = send(CPU, *arrays)
    assert [tensor.tolist() for tensor in sent] == lists
    assert {tensor.dtype for tensor in sent} == {torch.int32}
    assert {tensor.storage_offset() % ALIGNMENT for tensor in sent} == {0}
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == 1, "one copy"


def test_on_a_cpu_outputs_are_not_copied() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    arrays = fetch({"dense_vecs": tensor}, open_stream(CPU)).wait()
    assert arrays["dense_vecs"].tolist() == tensor.tolist()
    assert arrays["dense_vecs"].ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, [1.5]),
        (
            {
                "proc/self/cgroup": "0::/jobs.slice/night.service\n",
                "sys/fs/cgroup/jobs.slice/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/jobs.slice/night.service/cpu.max": "max 100000\n",
            },
            [4.0],
        ),
        (  # Docker with version 1, where the path is that of the host
            {
                "proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/docker/1f\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [2.0],
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [],
        ),
    ],
)
def test_a_container_is_asked_for_its_cpus(files: dict[str, str], limits: list[float], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_cpu_limits(tmp_path) == limits


def test_threads_are_no_more_than_the_cpus_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    for limits, threads in (([], 64), ([3.5], 4), ([0.2, 8.0], 1), ([96.0], 64)):
        monkeypatch.setattr("m3cli.encoder.device.read_cpu_limits", lambda limits=limits: limits)
        assert auto_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert auto_threads() == 64, "what the user typed"


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch asks for a driver, or has the memory")
def test_without_pinned_memory_arrays_are_pageable() -> None:
    """Here torch has none at all, and says so."""
    assert _allocate((3, 4), torch.float16, pinned=True).shape == (3, 4)
    with pytest.raises(RuntimeError, match="negative"):
        _allocate((-1,), torch.float16, pinned=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ACCELERATOR_ERROR("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_known_by_class_or_text(error: Exception) -> None:
    assert lacks_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ACCELERATOR_ERROR("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not lacks_memory(error)


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


def warn_of_driver() -> bool:
    warnings.warn("CUDA initialization: The NVIDIA driver is too old (found version 12020). Please", stacklevel=1)
    return False


@pytest.mark.parametrize(
    ("built_for", "visible", "reason"),
    [
        (None, None, r"torch \S+ is built without CUDA, and there is an NVIDIA GPU; install a CUDA build"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES= hides the NVIDIA GPU"),
        (
            "13.0",
            None,
            r"torch \S+ for CUDA 13.0 cannot use the NVIDIA GPU with driver 535.104.05 \(CUDA initialization: .*\); "
            "update the driver, or install a torch for an older CUDA",
        ),
    ],
)
def test_auto_says_why_it_chooses_the_cpu(
    built_for: str | None,
    visible: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "version").write_text(DRIVER)
    monkeypatch.setattr(device, "_GPU_FILES", (str(tmp_path / "version"),))
    monkeypatch.setattr(device, "_DRIVER_FILE", str(tmp_path / "version"))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", warn_of_driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device._warn_once.cache_clear()
    assert resolve_device("auto") == resolve_device(None) == resolve_device("cpu") == "cpu"
    (record,) = caplog.records
    assert re.fullmatch(f"--device auto chooses the CPU: {reason}", record.message)


def test_auto_says_nothing_where_there_is_no_gpu_or_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "_GPU_FILES", ("/nonexistent",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    monkeypatch.setattr(device, "_GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"
    assert not caplog.records


def test_a_matmul_on_a_gpu_is_not_waited_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    monkeypatch.setattr(device, "auto_batch_tokens", lambda _: 65536)
    monkeypatch.setattr(device, "time_matmul", lambda *_, **sizes: seen.update(sizes) or 1.0)
    assert measure_matmul("cuda:1", "float16") == 1.0
    assert seen["rows"] == 65536
    assert seen["calls"] >= 10


def test_the_rate_counts_all_matmuls_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"rows": 64, "width": 32, "columns": 16, "seconds": 0.0, "calls": 5}
    monkeypatch.setattr(time, "perf_counter", iter([0, 100, 100, 101, 200, 203, 300, 302]).__next__)
    flops = 2 * 64 * 32 * 16 * 5
    assert time_matmul("cpu", "float32", **sizes) == flops / 1
    monkeypatch.setattr(time, "perf_counter", iter([0, 100, 100, 101, 200, 203, 300, 302]).__next__)
    assert time_matmul("cpu", "float32", **sizes, best=False) == flops / 2

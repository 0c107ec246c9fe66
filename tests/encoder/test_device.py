"""What `auto` resolves to on this machine; copies to a device and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.device import (
    ALIGNMENT,
    MAX_PARALLEL,
    auto_dtype,
    fetch,
    is_emulated,
    open_stream,
    plan_threads,
    resolve_dtype,
    send,
)
from m3cli.encoder.linear import can_run_int8
from m3cli.encoder.model import load_model
from m3cli.errors import UsageError

CPU = torch.device("cpu")


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
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    for dtype, name in (("float32", None), ("bfloat16", "avx512_bf16"), ("float16", "avx512_fp16")):
        caplog.clear()
        load_model(read_checkpoint(tiny_m3), device="cpu", dtype=dtype)  # type: ignore[arg-type]
        words = f"{dtype} is not in this CPU's hardware: float32 would be several times faster here"
        assert [record.message for record in caplog.records] == ([] if name is None or has.get(name) else [words])
    assert auto_dtype("cpu") == ("bfloat16" if has.get("avx512_bf16") else "float32")
    assert not is_emulated(torch.float16, "cuda:0")


@pytest.mark.parametrize("has", [{"avx512_vnni": True}, {"avx2": True}])
def test_int8_needs_a_cpu_whose_products_do_not_overflow(has: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    if "avx512_vnni" in has and can_run_int8():
        assert resolve_dtype("int8", "cpu") == "int8"
    else:
        with pytest.raises(UsageError, match="--dtype int8: "):
            resolve_dtype("int8", "cpu")


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

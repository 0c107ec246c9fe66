from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.transfer import ALIGNMENT, fetch, open_stream, send

CPU = torch.device("cpu")


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

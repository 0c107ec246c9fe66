"""Copies of arrays to a device and of outputs back, asynchronous until the outputs are read.

On CUDA both directions use pinned memory, because a copy from pageable memory blocks. Output arrays are views of pinned
memory and own it. It is not copied to pageable memory, which would take longer than the device's copy. torch reuses the
block after the last view is freed. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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

"""Numbers to a device and outputs back, in copies that nobody waits for until the outputs are looked at.

On CUDA both ways go through pinned memory: from pageable memory a copy is staged, and waits. What comes back lies in
pinned memory and stays there: the arrays are views of it and own it, so it is copied no further, and when the last of
them goes torch keeps the block for a later batch. (Copying a ColBERT batch of 128 MiB on into pageable memory would
touch as many fresh pages, which takes longer than the device's copy.) On a CPU outputs are where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 32
"int32 numbers, 128 bytes: arrays that travel together begin at multiples of it, as kernels like it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Tensors on their way to the host."""

    tensors: Mapping[str, torch.Tensor]
    "on the host; not to be read before `ready`"
    ready: torch.cuda.Event | None
    "None: they have been there from the start"

    def wait(self) -> dict[str, NDArray[Any]]:
        """Return them as arrays that own their memory, once they are all there."""
        if self.ready is not None:
            self.ready.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def send(device: torch.device, *arrays: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    """Return integer arrays [...] as int32 tensors on a device, all sent in one copy."""
    begins = np.cumsum([0, *(-(-len(array) // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    # Let go of at the end of this function, a pinned block is not handed out again before its copy is done.
    packed = torch.empty(begins[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    into = packed.numpy()
    for begin, array in zip(begins[:-1], arrays, strict=True):
        into[begin : begin + len(array)] = array
    sent = packed.to(device, non_blocking=True)
    return tuple(sent[begin : begin + len(array)] for begin, array in zip(begins[:-1], arrays, strict=True))


def open_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies that run beside a device's kernels; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def fetch(tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream | None) -> Fetched:
    """Begin to copy tensors to the host behind what is queued for them, on a stream of `open_stream`."""
    if stream is None:
        return Fetched(tensors=tensors, ready=None)
    arriving = {}
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for name, tensor in tensors.items():
            arriving[name] = _make_room(tensor)
            arriving[name].copy_(tensor, non_blocking=True)
            # Its memory may be needed by a later batch, whose kernels run on another stream.
            tensor.record_stream(stream)
        # Blocking: the waiting thread sleeps, as others have work for the core.
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record(stream)
    return Fetched(tensors=arriving, ready=ready)


def _make_room(tensor: torch.Tensor) -> torch.Tensor:
    """Return pinned memory for a tensor; where the system gives no more of it, other memory: that copy waits."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return torch.empty(tensor.shape, dtype=tensor.dtype)

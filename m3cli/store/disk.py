"""How fast a folder's disk takes what is written to it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from m3cli.store.commit import output_errors, remove, sync_file

_BYTES = 64 << 20
_PIECE = os.urandom(1 << 20)


def measure_write_rate(folder: Path) -> float:
    """Return bytes/s of writing 64 MiB to a new file and making them durable.

    Raises:
        OutputError: the folder cannot be written to.
    """
    path = folder / f".m3-doctor-{os.getpid()}.tmp"
    try:
        with output_errors(path), path.open("wb") as file:
            began = time.perf_counter()
            for _ in range(_BYTES // len(_PIECE)):
                file.write(_PIECE)
            file.flush()
            sync_file(file.fileno())
            return _BYTES / (time.perf_counter() - began)
    finally:
        remove(path)

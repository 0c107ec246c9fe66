"""The writer alone, fed from memory, against `np.save` plus fsync of the same ColBERT vectors in the same folder.

    scripts/bench writer FOLDER [--mib 512] [--rounds 5]

In each round, in rotating order: np.save and fsync, the writer to npy, to Parquet, and to Parquet with its vectors
compressed by zstd. The writer does everything that it does in `m3 encode`: rows, hashes of every file, fsync, renames
and the done entry. Printed is the median over the rounds, of the ratio to np.save in the same round too.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import draw_table, make_parser, save_results
from benchmarks.stored import write_colbert

DIM = 1024
TOKENS = 221
"per row, so 220 vectors"
WINDOW_BYTES = 128 << 20
FORMS: dict[str, dict[str, str]] = {
    "npy": {"format": "npy"},
    "parquet": {"format": "parquet"},
    "parquet zstd": {"format": "parquet", "compression": "zstd"},
}


def make_windows(mib: int) -> list[NDArray[np.float16]]:
    """Return windows of so many MiB of float16 vectors in all: random directions, norm 1."""
    row_bytes = (TOKENS - 1) * DIM * 2
    rows, at_once = max(1, (mib << 20) // row_bytes), max(1, WINDOW_BYTES // row_bytes)
    random = np.random.default_rng(0)
    windows = []
    for start in range(0, rows, at_once):
        vectors = random.standard_normal((min(at_once, rows - start) * (TOKENS - 1), DIM), dtype=np.float32)
        windows.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    return windows


def save_plainly(path: Path, vectors: NDArray[np.float16]) -> None:
    """Save the vectors as one array, and make it durable."""
    with path.open("wb") as file:
        np.save(file, vectors)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Measure in the folder that the command line names."""
    parser = make_parser(__doc__, needs_model=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    windows = make_windows(options.mib)
    together = np.concatenate(windows)
    work = options.folder / "bench-writer.tmp"
    seconds: dict[str, list[float]] = {"np.save": [], **{name: [] for name in FORMS}}
    sizes: dict[str, int] = {}
    ways = list(seconds.items())
    for number in range(options.rounds):
        turn = number % len(ways)
        for name, spent in (*ways[turn:], *ways[:turn]):
            work.mkdir(parents=True)
            try:
                began = time.perf_counter()
                if name == "np.save":
                    save_plainly(work / "vectors.npy", together)
                else:
                    write_colbert(work / "out.m3", windows, tokens=TOKENS, **FORMS[name])
                spent.append(time.perf_counter() - began)
                sizes[name] = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
            finally:
                shutil.rmtree(work)
    base, size = seconds["np.save"], sizes["np.save"]
    figures = {
        name: {
            "megabytes_per_second": statistics.median(size / mine for mine in spent) / 1e6,
            "rate_of_np_save": statistics.median(plain / mine for plain, mine in zip(base, spent, strict=True)),
            "bytes_of_np_save": sizes[name] / size,
        }
        for name, spent in seconds.items()
    }
    rows = [(name, *(f"{value:.2f}" for value in figure.values())) for name, figure in figures.items()]
    print(draw_table(("", "MB/s", "rate / np.save", "bytes / np.save"), rows, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"mib": options.mib, "figures": figures})


if __name__ == "__main__":
    main()

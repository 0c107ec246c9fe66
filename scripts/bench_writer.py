#!/usr/bin/env python3
"""The writer alone, fed from memory, against `np.save` plus fsync of the same ColBERT vectors in the same folder.

    scripts/bench_writer.py FOLDER [--mib 512] [--rounds 5]

In each round, each time in another order: np.save and fsync, the writer to npy, to Parquet, and to Parquet with its
vectors compressed by zstd. The writer does all that `m3 encode` has it do: rows, hashes of every file, fsync, renames
and the done entry. What is printed is the median over the rounds, of the ratio to np.save in the same round too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from m3cli.records import Chunks, Document, Embeddings, Shard, ShardText, TokenMatrices
from m3cli.store.folder import open_run_folder
from m3cli.store.layout import RowForm

DIM = 1024
TOKENS = 221
"of a row, so 220 vectors"
WINDOW_BYTES = 128 << 20


def make_windows(mib: int) -> tuple[ShardText, Chunks, list[Embeddings]]:
    """Make a shard of so many MiB of float16 vectors that look like a model's: random directions, norm 1."""
    rows = max(1, (mib << 20) // ((TOKENS - 1) * DIM * 2))
    documents = tuple(
        Document(
            id=f"d{number}",
            text="text",
            text_hash=divmod(xxhash.xxh3_128_intdigest(b"%d" % number), 1 << 64),
            has_own_id=True,
            position=number,
        )
        for number in range(rows)
    )
    text = ShardText(
        shard=Shard(index=0, source=0, start=0, stop=rows),
        documents=documents,
        kept=None,
        skipped=(),
        input_hash="0" * 32,
    )
    numbers = np.arange(rows)
    chunks = Chunks(
        input_ids=np.zeros(rows * TOKENS, np.int32),
        cu_seqlens=np.arange(rows + 1, dtype=np.int64) * TOKENS,
        document=numbers,
        chunk_index=np.zeros(rows, np.int32),
        num_chunks=np.ones(rows, np.int32),
        char_start=np.zeros(rows, np.int64),
        char_end=np.full(rows, 4, np.int64),
        truncated=np.zeros(rows, np.bool_),
        num_repeated=np.zeros(rows, np.int32),
    )
    random = np.random.default_rng(0)
    at_once = max(1, WINDOW_BYTES // ((TOKENS - 1) * DIM * 2))
    windows = []
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        vectors = random.standard_normal((count * (TOKENS - 1), DIM), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        matrices = TokenMatrices(
            indptr=np.arange(count + 1) * (TOKENS - 1),
            vectors=vectors.astype(np.float16),
        )
        windows.append(
            Embeddings(
                rows=np.arange(start, start + count), dense_vecs=None, lexical_weights=None, colbert_vecs=matrices
            )
        )
    return text, chunks, windows


def save_plainly(path: Path, vectors: NDArray[np.float16]) -> None:
    """Save the vectors as one array, and make it durable."""
    with path.open("wb") as file:
        np.save(file, vectors)
        file.flush()
        os.fsync(file.fileno())


def write_shard(out: Path, form: RowForm, text: ShardText, chunks: Chunks, windows: list[Embeddings]) -> None:
    """Write and commit a shard."""
    with open_run_folder(out) as folder, folder.open_shard(form=form, text=text, chunks=chunks, source="x") as writer:
        for window in windows:
            writer.append(window)
        folder.commit(writer.finish())


def main() -> None:
    """Measure in the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    text, chunks, windows = make_windows(given.mib)
    whole = np.concatenate([window.colbert_vecs.vectors for window in windows if window.colbert_vecs is not None])
    form = RowForm(format="npy", outputs=("colbert",), dim=DIM, vocabulary=250002)
    parquet = replace(form, format="parquet")
    forms = {"npy": form, "parquet": parquet, "parquet zstd": replace(parquet, compression="zstd")}
    place = given.folder / "bench-writer.tmp"
    seconds: dict[str, list[float]] = {"np.save": [], **{name: [] for name in forms}}
    sizes: dict[str, int] = {}
    ways = list(seconds.items())
    for number in range(given.rounds):
        turn = number % len(ways)
        for name, spent in (*ways[turn:], *ways[:turn]):
            place.mkdir(parents=True)
            try:
                began = time.perf_counter()
                if name == "np.save":
                    save_plainly(place / "vectors.npy", whole)
                else:
                    write_shard(place / "out.m3", forms[name], text, chunks, windows)
                spent.append(time.perf_counter() - began)
                sizes[name] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            finally:
                shutil.rmtree(place)
    base, size = seconds["np.save"], sizes["np.save"]
    for name, spent in seconds.items():
        ratio = statistics.median(plain / mine for plain, mine in zip(base, spent, strict=True))
        rate = statistics.median(size / mine for mine in spent) / 1e6
        print(f"{name:14} {rate:7.0f} MB/s  {ratio:.2f} of np.save  {sizes[name] / size:.3f} of its bytes")


if __name__ == "__main__":
    main()

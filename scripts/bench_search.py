#!/usr/bin/env python3
"""Times `m3 search --mode dense` against faiss.IndexFlatIP over the same vectors, in one run, in turns.

    scripts/bench_search.py [--rows 200000] [--dims 384 1024] [--queries 1 32 1000] [--top-k 100] [--out FILE.json]

A folder of random unit vectors in float16 is written for each width and format. Three times are taken, the best of
--rounds each: m3 from the folder on disk; faiss from the same folder, which must read it and add it as float32 first;
and faiss alone over float32 that is in memory already. m3 never holds the corpus. Needs faiss-cpu; says so without.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from m3cli.config import RunConfig

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS.parent))
SHARD_ROWS = 20_000


def main(argv: Sequence[str] | None = None) -> int:
    """Time all combinations and print a table."""
    parser = argparse.ArgumentParser(description="Time m3's exact dense search against faiss.IndexFlatIP.")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 1024])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 1000])
    parser.add_argument("--formats", nargs="+", default=["parquet", "npy"])
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=SCRIPTS.parent / ".cache" / "bench_search")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args(argv)
    try:
        import faiss  # noqa: PLC0415, F401
    except ImportError:
        print("faiss is not installed, so there is nothing to compare with: pip install faiss-cpu")
        return 0
    print(f"{options.rows:,} rows of float16, top {options.top_k}; ratios below 2 are what is promised")
    figures: list[dict[str, Any]] = []
    for dim in options.dims:
        for form in options.formats:
            folder = write_folder(options.folder, rows=options.rows, dim=dim, form=form)
            for queries in options.queries:
                figures.append(compare(folder, form, queries, options))
                print_line(figures)
            shutil.rmtree(folder)
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def make_run(dim: int) -> RunConfig:
    """Return the run.json of a folder of dense vectors."""
    from m3cli.config import CheckpointConfig, EncodeConfig, RunConfig, Runtime  # noqa: PLC0415  a second
    from m3cli.records import Fields, Source  # noqa: PLC0415

    return RunConfig(
        config=EncodeConfig(
            fields=Fields(text="text", id="id", title=None, kept=(), columns=(), header=False),
            outputs=("dense",),
            max_length=512,
            dtype="float32",
            shard_size=1 << 20,
        ),
        checkpoint=CheckpointConfig(
            name="random", path="random", revision=None, dim=dim, vocabulary=10, hashes={}, tokenizer_hash="0"
        ),
        sources=(Source(name="s", path="s", format="jsonl", compression="none", size=0, mtime_ns=0),),
        runtime=Runtime(max_batch_tokens=1, threads=1),
    )


def write_folder(place: Path, *, rows: int, dim: int, form: str) -> Path:
    """Write a folder of random unit vectors; a row is a document."""
    from m3cli.records import Chunks, Document, Embeddings, Shard, ShardText  # noqa: PLC0415  a second
    from m3cli.store.folder import open_run_folder  # noqa: PLC0415
    from m3cli.store.layout import RowForm  # noqa: PLC0415

    root = place / f"{rows}x{dim}.{form}.m3"
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(dim)
    layout = RowForm(format=form, outputs=("dense",), dim=dim, vocabulary=10)  # type: ignore[arg-type]
    with open_run_folder(root) as folder:
        folder.write_run(make_run(dim))
        for index, first in enumerate(range(0, rows, SHARD_ROWS)):
            count = min(SHARD_ROWS, rows - first)
            documents = tuple(
                Document(id=f"d{first + row}", text="x", text_hash=(0, row), has_own_id=True, position=row)
                for row in range(count)
            )
            shard = Shard(index=index, source=0, start=first, stop=first + count)
            text = ShardText(shard=shard, documents=documents, kept=None, skipped=(), input_hash="0" * 32)
            zeros = np.zeros(count, np.int32)
            chunks = Chunks(
                input_ids=np.zeros(2 * count, np.int32),
                cu_seqlens=np.arange(0, 2 * count + 1, 2),
                document=np.arange(count),
                chunk_index=zeros,
                num_chunks=zeros + 1,
                char_start=np.zeros(count, np.int64),
                char_end=np.ones(count, np.int64),
                truncated=np.zeros(count, np.bool_),
                num_repeated=zeros,
            )
            dense = draw.standard_normal((count, dim), np.float32)
            dense = (dense / np.linalg.norm(dense, axis=1, keepdims=True)).astype(np.float16)
            made = Embeddings(rows=np.arange(count), dense_vecs=dense, lexical_weights=None, colbert_vecs=None)
            with folder.open_shard(form=layout, text=text, chunks=chunks, source="bench") as writer:
                writer.append(made)
                folder.commit(writer.finish())
        folder.write_manifest(index + 1)
    return root


def compare(root: Path, form: str, num_queries: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time one combination; the hits must be the same."""
    import faiss  # noqa: PLC0415

    from m3cli.jobs.search_folder import Target, search_single  # noqa: PLC0415
    from m3cli.records import Embeddings  # noqa: PLC0415
    from m3cli.store.reader import iter_parts, open_folder  # noqa: PLC0415

    folder = open_folder(root)
    dim = next(iter_parts(folder, outputs=("dense",), columns=())).embeddings.dense_vecs.shape[1]  # type: ignore[union-attr]
    vectors = np.random.default_rng(7).standard_normal((num_queries, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = Embeddings(rows=np.arange(num_queries), dense_vecs=vectors, lexical_weights=None, colbert_vecs=None)
    target = Target(folder=folder, vocabulary=10, device="cpu", top_k=options.top_k, chunks=False)

    def load() -> Any:
        index = faiss.IndexFlatIP(dim)
        for part in iter_parts(folder, outputs=("dense",), columns=()):
            index.add(np.asarray(part.embeddings.dense_vecs, np.float32))
        return index

    held = load()
    times = take_turns(
        {
            "m3": lambda: search_single(target, queries, "dense"),
            "faiss_from_disk": lambda: load().search(vectors, options.top_k),
            "faiss_in_memory": lambda: held.search(vectors, options.top_k),
        },
        rounds=options.rounds,
    )
    ours, (theirs, _) = search_single(target, queries, "dense").ranked, held.search(vectors, options.top_k)
    apart = np.abs(ours.score.reshape(num_queries, -1) - theirs).max()
    if apart > 1e-4:
        raise SystemExit(f"scores differ by {apart:.1e}: what was timed is not the same search")
    return {
        "rows": folder.counts.chunks,
        "dim": dim,
        "format": form,
        "queries": num_queries,
        "top_k": options.top_k,
        **{f"{name}_seconds": round(seconds, 4) for name, seconds in times.items()},
        "m3_to_faiss_from_disk": round(times["m3"] / times["faiss_from_disk"], 2),
        "m3_to_faiss_in_memory": round(times["m3"] / times["faiss_in_memory"], 2),
    }


def take_turns(runs: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Return the best seconds of each, one after the other in every round, so that a noisy machine is fair."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def print_line(figures: list[dict[str, Any]]) -> None:
    """Print the last figures, below a header if they are the first."""
    columns = [name for name in figures[0] if name not in ("rows", "top_k")]
    if len(figures) == 1:
        print("  ".join(f"{name:>8}" for name in columns))
    print("  ".join(f"{figures[-1][name]!s:>{max(len(name), 8)}}" for name in columns), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Time `m3 search --mode dense` against faiss.IndexFlatIP over the same vectors, in one run, in turns.

    scripts/bench search [--rows 200000] [--dims 384 1024] [--queries 1 100] [--top-k 100] [--json FILE]

A folder of random unit vectors in float16 is written for each width and format. Three times are taken, the best of
--rounds each: m3 from the folder on disk; faiss from the same folder, which it reads and adds as float32 first; and
faiss alone over float32 already in memory. m3 never holds the corpus. Needs faiss-cpu.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import WORK
from benchmarks.report import draw_table, make_parser, save_results
from benchmarks.stored import iter_dense, search_dense, write_vectors


def main() -> None:
    """Time all combinations and print a table."""
    parser = make_parser(__doc__, needs_model=False)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 1024])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--formats", nargs="+", default=["parquet", "npy"])
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=WORK, help="for the folders")
    options = parser.parse_args()
    try:
        import faiss  # noqa: PLC0415, F401
    except ImportError:
        sys.exit("faiss is not installed: pip install faiss-cpu")
    figures: list[dict[str, Any]] = []
    for dim in options.dims:
        for form in options.formats:
            folder = options.work / f"search-{options.rows}x{dim}.{form}.m3"
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_vectors(folder, rows=options.rows, dim=dim, form=form)
            figures += [compare(folder, form, dim, queries, options) for queries in options.queries]
            shutil.rmtree(folder)
    rows = [
        (
            f"{figure['dim']}, {figure['format']}",
            str(figure["queries"]),
            *(f"{figure[name]:.2f}" for name in ("m3_to_faiss_from_disk", "m3_to_faiss_in_memory")),
        )
        for figure in figures
    ]
    header = ("width, format", "queries", "m3's time / faiss from disk", "m3's time / faiss in memory")
    print(draw_table(header, rows, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"rows": options.rows, "top_k": options.top_k, "figures": figures})


def compare(folder: Path, form: str, dim: int, num_queries: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time one combination; the scores must agree."""
    import faiss  # noqa: PLC0415

    queries = np.random.default_rng(7).standard_normal((num_queries, dim), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)

    def load() -> Any:
        index = faiss.IndexFlatIP(dim)
        for vectors in iter_dense(folder):
            index.add(vectors)
        return index

    held = load()
    times = take_turns(
        {
            "m3": lambda: search_dense(folder, queries, top_k=options.top_k),
            "faiss_from_disk": lambda: load().search(queries, options.top_k),
            "faiss_in_memory": lambda: held.search(queries, options.top_k),
        },
        rounds=options.rounds,
    )
    difference = np.abs(
        search_dense(folder, queries, top_k=options.top_k) - held.search(queries, options.top_k)[0]
    ).max()
    if difference > 1e-4:
        sys.exit(f"scores differ by {difference:.1e}: the two searches are not the same")
    return {
        "dim": dim,
        "format": form,
        "queries": num_queries,
        **{f"{name}_seconds": round(seconds, 4) for name, seconds in times.items()},
        "m3_to_faiss_from_disk": round(times["m3"] / times["faiss_from_disk"], 2),
        "m3_to_faiss_in_memory": round(times["m3"] / times["faiss_in_memory"], 2),
    }


def take_turns(runs: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Return the best seconds of each run; runs alternate, so that a noisy machine is fair."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()

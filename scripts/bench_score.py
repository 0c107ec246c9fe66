#!/usr/bin/env python3
"""Times `m3 score` against FlagEmbedding's `compute_score`: the same pairs, checkpoint and run, loading left out.

    scripts/bench_score.py CHECKPOINT [--pairs 1000] [--queries 50] [--reference-pairs 200] [--dtypes bfloat16]

The pairs are made of real texts (scripts/make_sample_corpus.py): each query with its share of passages. FlagEmbedding
runs float32 at several batch sizes and its best counts; it is timed on the first --reference-pairs pairs, as its
pairs/s do not depend on their number and 1,000 take minutes. Both sides run once before they are timed.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS.parent))
Pairs = list[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Time both and print pairs/s and the ratio."""
    parser = argparse.ArgumentParser(description="Time m3 score against FlagEmbedding's compute_score.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--reference-pairs", type=int, default=200)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--corpus", type=Path, help="JSON lines with text; default: the sample corpus")
    options = parser.parse_args(argv)
    pairs = make_pairs(read_texts(options.corpus), num_pairs=options.pairs, num_queries=options.queries)
    print(f"{len(pairs)} pairs of {options.queries} queries")
    reference = time_reference(options.checkpoint, pairs[: options.reference_pairs], options.batch_sizes)
    for dtype in options.dtypes:
        ours = time_ours(options.checkpoint, pairs, dtype)
        print(f"m3 {dtype}: {ours:.1f} pairs/s, {ours / reference:.1f} times FlagEmbedding's best")
    return 0


def read_texts(corpus: Path | None) -> list[str]:
    """Read texts of some length from a corpus."""
    if corpus is None:
        corpus = SCRIPTS.parent / ".cache" / "sample.jsonl"
        if not corpus.exists():
            subprocess.run([sys.executable, SCRIPTS / "make_sample_corpus.py", corpus], check=True)
    lines = corpus.read_text(encoding="utf-8").splitlines()
    return [text for text in (json.loads(line)["text"] for line in lines) if text.strip()]


def make_pairs(texts: list[str], *, num_pairs: int, num_queries: int) -> Pairs:
    """Pair each query, a short text, with as many passages, three texts put together; queries take turns."""
    draw = random.Random(11)
    queries = sorted(draw.sample(texts, 4 * num_queries), key=len)[num_queries : 2 * num_queries]
    passages = [" ".join(draw.choices(texts, k=3)) for _ in range(num_pairs)]
    return [(queries[place % num_queries], passage) for place, passage in enumerate(passages)]


def time_reference(checkpoint: Path, pairs: Pairs, batch_sizes: list[int]) -> float:
    """Return FlagEmbedding's best pairs/s."""
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  6 s, not for --help

    model = BGEM3FlagModel(str(checkpoint), use_fp16=False, devices="cpu")
    model.compute_score(pairs[:4], batch_size=4)
    best = 0.0
    for batch_size in batch_sizes:

        def score(size: int = batch_size) -> Any:
            return model.compute_score(pairs, batch_size=size, max_query_length=512, max_passage_length=512)

        rate = len(pairs) / time_once(score)
        print(f"FlagEmbedding float32, batch {batch_size}: {rate:.1f} pairs/s", flush=True)
        best = max(best, rate)
    return best


def time_ours(checkpoint: Path, pairs: Pairs, dtype: str) -> float:
    """Return m3's pairs/s: tokenising, encoding and scoring, in windows as `m3 score` cuts them."""
    from m3cli.corpus.pairs import Pair, cut_windows  # noqa: PLC0415
    from m3cli.jobs.score import ScoreRequest, finish_scores  # noqa: PLC0415
    from m3cli.jobs.score_texts import TextScorer  # noqa: PLC0415
    from m3cli.progress import Progress  # noqa: PLC0415
    from m3cli.retrieval.modes import MODES, parts_of  # noqa: PLC0415

    scorer = TextScorer(ScoreRequest(pairs="-", model=str(checkpoint), dtype=dtype, device="cpu"), Progress("none"))
    scorer.load(parts_of(MODES))
    rows = [
        Pair(number=number, query=query, passage=passage, fault="", row={}, raw=b"", batch=None)
        for number, (query, passage) in enumerate(pairs, start=1)
    ]

    def score(some: list[Pair]) -> None:
        for window in cut_windows(some, scorer.limits):
            finish_scores(scorer.score_window(window), MODES, weights=(1.0, 1.0, 1.0))

    score(rows[:4])
    return len(rows) / time_once(lambda: score(rows))


def time_once(run: Callable[[], Any]) -> float:
    """Return seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())

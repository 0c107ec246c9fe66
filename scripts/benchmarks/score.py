"""Time `m3 score` against FlagEmbedding's `compute_score`: the same pairs and checkpoint, loading excluded.

    scripts/bench score --model DIR --corpus FILE.jsonl [--pairs 1000] [--queries 50] [--reference-pairs 200]

The pairs are made of real texts: each query with its share of passages. m3's seconds are those of the command over all
pairs minus those over the first four, which are start and loading. FlagEmbedding runs float32 at several batch sizes
and its best counts. It is timed on the first --reference-pairs pairs, after a warm-up: its pairs/s do not depend on
their number, and 1,000 take minutes.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from benchmarks.contest import WORK, open_work, run_m3, say
from benchmarks.report import draw_table, make_parser, save_results
from benchmarks.texts import read_texts

Pairs = list[tuple[str, str]]


def make_pairs(texts: list[str], *, num_pairs: int, num_queries: int) -> Pairs:
    """Pair each query, a short text, with as many passages, three texts joined; queries take turns."""
    draw = random.Random(11)
    texts = [" ".join(text.split()) for text in texts]
    queries = sorted(draw.sample(texts, min(len(texts), 4 * num_queries)), key=len)[: 2 * num_queries][-num_queries:]
    passages = [" ".join(draw.choices(texts, k=3)) for _ in range(num_pairs)]
    return [(queries[number % num_queries], passage) for number, passage in enumerate(passages)]


def time_reference(model: Path, pairs: Pairs, batch_sizes: list[int]) -> float:
    """Return FlagEmbedding's best pairs/s."""
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  6 s, not for --help

    reference = BGEM3FlagModel(str(model), use_fp16=False, devices="cpu")
    reference.compute_score(pairs[:4], batch_size=4)
    best = 0.0
    for batch_size in batch_sizes:
        began = time.perf_counter()
        reference.compute_score(pairs, batch_size=batch_size, max_query_length=512, max_passage_length=512)
        best = max(best, len(pairs) / (time.perf_counter() - began))
        say(f"FlagEmbedding, batch {batch_size}: best so far {best:.1f} pairs/s")
    return best


def time_m3(model: Path, pairs: Pairs, dtype: str, work: Path) -> float:
    """Return m3's pairs/s."""
    seconds = []
    for few in (pairs[:4], pairs):
        path = work / f"{len(few)}.tsv"
        path.write_text("".join(f"{query}\t{passage}\n" for query, passage in few), encoding="utf-8")
        out = work / f"{len(few)}-{dtype}.jsonl"
        flags = ("--model", str(model), "--dtype", dtype, "--device", "cpu", "--out", str(out))
        seconds.append(run_m3("score", str(path), *flags))
    return (len(pairs) - 4) / (seconds[1] - seconds[0])


def main() -> None:
    """Time both and print pairs/s and the ratio."""
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--reference-pairs", type=int, default=200)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    options = parser.parse_args()
    pairs = make_pairs(read_texts(options.corpus), num_pairs=options.pairs, num_queries=options.queries)
    rates = {
        "FlagEmbedding float32": time_reference(options.model, pairs[: options.reference_pairs], options.batch_sizes)
    }
    with open_work(WORK) as work:
        for dtype in options.dtypes:
            rates[f"m3 {dtype}"] = time_m3(options.model, pairs, dtype, work)
    reference = rates["FlagEmbedding float32"]
    rows = [(name, f"{rate:,.1f}", f"{rate / reference:.1f}") for name, rate in rates.items()]
    print(draw_table(("", "pairs/s", "times FlagEmbedding"), rows, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"pairs": options.pairs, "queries": options.queries, "pairs_per_second": rates})


if __name__ == "__main__":
    main()

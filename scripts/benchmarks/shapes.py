"""Tokens per second by number of texts, tokens of each and threads, m3 against its peers in the same precision.

    scripts/bench shapes --model DIR --corpus FILE.jsonl [--threads 1 2] [--rounds 3] [--json OUT.json]

A cell is a number of texts of one length, at most --most tokens in all, given in one call; its time is the median of
calls for --seconds, and of the rounds the fastest counts. Contenders take turns in each round, each in a process of its
own. The last column is m3 over the fastest peer of that precision: FlagEmbedding (all three outputs), OpenVINO and
sentence-transformers (dense vectors only, as is m3's second row).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from benchmarks.contest import WORK, Contest, Group, say
from benchmarks.peers import read_max_length
from benchmarks.report import EMPTY, draw_table, make_parser, save_results
from benchmarks.texts import cut_texts, make_group, read_texts
from m3cli.encoder.device import INT8, cpu_has

COUNTS, LENGTHS = (1, 16, 256), (8, 64, 512, 8192)
BATCH_TOKENS = 4096
"of a peer's batch"
Rates = dict[str, list[float]]
"tokens per second by contender and cell"


def list_contenders() -> dict[str, tuple[str, ...]]:
    """Return the contenders by precision, as benchmarks.contender takes them, m3 with all outputs first."""
    peers = {
        "float32": ("FlagEmbedding 16", "sentence-transformers float32 16", f"OpenVINO float32 {BATCH_TOKENS}"),
        "bfloat16": ("sentence-transformers bfloat16 16", f"OpenVINO bfloat16 {BATCH_TOKENS}"),
        **({"int8": (f"onnxruntime int8 {BATCH_TOKENS}", f"OpenVINO int8 {BATCH_TOKENS}")} if cpu_has(INT8) else {}),
    }
    return {dtype: (f"m3 {dtype}", f"m3 {dtype} dense", *names) for dtype, names in peers.items()}


def make_groups(options: argparse.Namespace) -> list[Group]:
    """Cut the corpus into the cells that the model takes."""
    backend = AutoTokenizer.from_pretrained(options.model).backend_tokenizer
    texts, limit = read_texts(options.corpus), read_max_length(options.model)
    return [
        make_group(
            cut_texts(texts, backend, length=length, count=count),
            backend,
            max_length=limit,
            batch=max(1, BATCH_TOKENS // length),
            seconds=options.seconds,
        )
        for count in options.counts
        for length in options.lengths
        if length <= limit and count * length <= options.most
    ]


def measure(contest: Contest, groups: Sequence[Group], options: argparse.Namespace, *, threads: int) -> Rates:
    """Return the best of the rounds of each contender, without those that do not run."""
    rates: Rates = {}
    names = [name for each in list_contenders().values() for name in each if options.only in name]
    for name in names * options.rounds:
        found = contest.measure(name, environment={"OMP_NUM_THREADS": str(threads)})
        if not isinstance(found, str):
            now = [group.tokens / one.seconds for group, one in zip(groups, found, strict=True)]
            rates[name] = list(map(max, now, rates.get(name, now)))
    return rates


def compare(rates: Rates, cell: int, dtype: str) -> float | None:
    """Return m3's rate over that of the best peer: all outputs against all, or dense against dense; the lower one."""
    _, _, *peers = names = list_contenders()[dtype]
    ratios = []
    for mine, theirs in (
        (names[0], [name for name in peers if name.startswith("FlagEmbedding")]),
        (names[1], [name for name in peers if not name.startswith("FlagEmbedding")]),
    ):
        best = [rates[name][cell] for name in theirs if name in rates]
        if mine in rates and best:
            ratios.append(rates[mine][cell] / max(best))
    return min(ratios, default=None)


def draw(found: Mapping[int, Rates], groups: Sequence[Group], *, markdown: bool) -> str:
    """Return the table: a row for each cell, precision and number of threads."""
    rows = []
    for threads, rates in found.items():
        for dtype, (mine, dense, *peers) in list_contenders().items():
            for cell, group in enumerate(groups):
                ratio = compare(rates, cell, dtype)
                shown = {name: rates[name][cell] for name in (mine, dense, *peers) if name in rates}
                best = max(peers, key=lambda name: shown.get(name, 0.0))
                rows.append(
                    (
                        f"{threads} threads, {dtype}, {len(group.texts)} x {group.tokens // len(group.texts)}",
                        *(f"{shown[name]:,.0f}" if name in shown else EMPTY for name in (mine, dense)),
                        f"{shown[best]:,.0f} {best.split()[0]}" if best in shown else EMPTY,
                        EMPTY if ratio is None else f"{ratio:.2f}",
                    )
                )
    return draw_table(
        ("texts x tokens", "m3, all three", "m3, dense", "fastest peer", "ratio"), rows, markdown=markdown
    )


def main() -> None:
    """Measure and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--most", type=int, default=65536, help="tokens of a cell at most")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="contenders with this in their name")
    options = parser.parse_args()
    groups = make_groups(options)
    contest = Contest(options.model, groups, cache=WORK)
    found = {threads: measure(contest, groups, options, threads=threads) for threads in options.threads}
    say("")
    print(draw(found, groups, markdown=options.markdown))
    if options.json:
        cells: list[dict[str, Any]] = [{"texts": len(group.texts), "tokens": group.tokens} for group in groups]
        save_results(options.json, {"cells": cells, "rates": found})


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What a corpus costs by its size: tokens/s, seconds and peak memory of the real `m3 encode --outputs dense,sparse`.

    scripts/bench growth --model DIR --corpus FILE.jsonl [--sizes 1000,10000,100000,1000000] [--repeat 3]

DIR is meant to be a small model, so that all but the encoder is what counts:
`scripts/make_demo_model.py DIR --random --layers 1 --hidden 64`. The rows are sentences of the given corpus, one to
seven a row, drawn at random with a fixed seed and written to --work row by row. The two largest sizes are run --repeat
times; the median counts. tokens/s leave out loading the model, as `m3 encode` reports them; seconds are from process
start to exit.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from speed_bench.command import encode
from speed_bench.running import WORK, open_work, say
from speed_bench.table import draw_table, save_results, show_bytes
from speed_bench.texts import read_texts, split_sentences, write_rows

REPEATED = 2
"of the largest sizes"


def measure_size(corpus: Path, *flags: str, work: Path, repeat: int) -> dict[str, Any]:
    """Encode a corpus `repeat` times; return the median of each number, and all runs."""
    runs = []
    for _ in range(repeat):
        out = work / "out.m3"
        shutil.rmtree(out, ignore_errors=True)
        done = encode(corpus, out, *flags)
        kept = ("tokens", "tokens_per_second", "peak_memory_bytes", "seconds", "bytes_written")
        runs.append({"wall_seconds": done.wall_seconds, **{name: done.metrics[name] for name in kept}})
        say(f"{corpus.stem}: {done.metrics['tokens_per_second']:,.0f} tokens/s, {done.wall_seconds:.1f} s")
        shutil.rmtree(out)
    numbers = ("tokens", "tokens_per_second", "wall_seconds", "peak_memory_bytes")
    return {**{name: statistics.median(run[name] for run in runs) for name in numbers}, "runs": runs}


def draw(rows: dict[int, dict[str, Any]], *, markdown: bool) -> str:
    """Return the table."""
    header = ("rows", "tokens", "seconds", "tokens/s", "peak memory", "runs")
    lines = [
        (
            f"{count:,}",
            f"{row['tokens']:,.0f}",
            f"{row['wall_seconds']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            show_bytes(row["peak_memory_bytes"]),
            str(len(row["runs"])),
        )
        for count, row in rows.items()
    ]
    return draw_table(header, lines, markdown=markdown)


def main() -> None:
    """Measure each size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--sizes", default="1000,10000,100000,1000000")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="where corpora and outputs lie meanwhile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    sizes = sorted(map(int, options.sizes.split(",")))
    sentences = split_sentences(read_texts(options.corpus))
    flags = ("--model", options.model, "--outputs", "dense,sparse", "--dtype", options.dtype)
    rows: dict[int, dict[str, Any]] = {}
    with open_work(options.work) as work:
        for count in sizes:
            corpus = write_rows(work / f"{count}.jsonl", sentences, count=count)
            repeat = options.repeat if count in sizes[-REPEATED:] else 1
            rows[count] = measure_size(corpus, *flags, work=work, repeat=repeat)
            corpus.unlink()
    say("")
    print(draw(rows, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"dtype": options.dtype, "sizes": rows})


if __name__ == "__main__":
    main()

"""The cost of a corpus by its size, and of a document by its size, in the real `m3 encode`.

    scripts/bench growth --model DIR --corpus FILE.jsonl [--sizes 1000,10000,100000,1000000] [--repeat 3]
    scripts/bench growth --documents --model DIR --corpus FILE.jsonl [--sizes 2.5,5,10,20] [--rows 5000]

DIR is a small model, so that everything but the encoder counts:
`scripts/make_demo_model.py DIR --random --layers 1 --hidden 64`. Rows are sentences of the given corpus, one to seven
per row, drawn at random with a fixed seed. The two largest sizes are run --repeat times; the median counts. tokens/s
exclude loading the model, as `m3 encode` reports them; seconds are from process start to exit.

With --documents, one shard per size (in MB): half of the short rows, a text of that size, a text of half that size
without any white space, the other short rows. Texts are those of the corpus, joined, and repeated at its end. The first
line has the short rows alone. If time and memory are linear, the difference to it grows with the size.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson

from benchmarks.contest import WORK, encode, open_work, say
from benchmarks.report import draw_table, format_bytes, make_parser, save_results
from benchmarks.texts import mix_rows, read_texts, split_sentences, write_rows

MB = 1_000_000
REPEATED = 2
"of the largest sizes"
NUMBERS = ("tokens", "tokens_per_second", "wall_seconds", "peak_memory_bytes", "reading_seconds")


def measure_size(corpus: Path, *flags: str, work: Path, repeat: int) -> dict[str, Any]:
    """Encode a corpus `repeat` times; return the median of each number, and all runs."""
    runs = []
    for _ in range(repeat):
        out = work / "out.m3"
        shutil.rmtree(out, ignore_errors=True)
        done = encode(corpus, out, *flags)
        kept = ("tokens", "tokens_per_second", "peak_memory_bytes", "seconds", "bytes_written", "chunks")
        runs.append(
            {
                "wall_seconds": done.wall_seconds,
                "reading_seconds": done.metrics["seconds"]["reading"],
                **{name: done.metrics[name] for name in kept},
            }
        )
        say(f"{corpus.stem}: {done.metrics['tokens_per_second']:,.0f} tokens/s, {done.wall_seconds:.1f} s")
        shutil.rmtree(out)
    return {**{name: statistics.median(run[name] for run in runs) for name in NUMBERS}, "runs": runs}


def join_texts(texts: Sequence[str], *, size: int, blanks: bool = True) -> str:
    """Return texts put one after the other until they are `size` bytes of UTF-8, with white space or without any."""
    parts, length = [], 0
    for text in cycle(texts):
        part = f"{text}\n\n" if blanks else "".join(text.split())
        parts.append(part)
        length += len(part.encode())
        if length >= size:
            break
    return "".join(parts).encode()[:size].decode(errors="ignore")


def write_shard(path: Path, texts: Sequence[str], *, size: int, rows: int) -> Path:
    """Write short rows, and if there is a size two long documents between them."""
    short = list(mix_rows(split_sentences(list(texts)), count=rows))
    long = []
    if size:
        spaced, joined = join_texts(texts, size=size), join_texts(texts, size=size // 2, blanks=False)
        long = [
            orjson.dumps({"id": name, "text": text}) + b"\n" for name, text in (("long", spaced), ("joined", joined))
        ]
    path.write_bytes(b"".join([*short[: rows // 2], *long, *short[rows // 2 :]]))
    return path


def draw(rows: dict[str, dict[str, Any]], *, markdown: bool) -> str:
    """Return the table."""
    header = ("size", "tokens", "seconds", "of them reading and tokenising", "tokens/s", "peak memory", "runs")
    lines = [
        (
            size,
            f"{row['tokens']:,.0f}",
            f"{row['wall_seconds']:,.1f}",
            f"{row['reading_seconds']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            format_bytes(row["peak_memory_bytes"]),
            str(len(row["runs"])),
        )
        for size, row in rows.items()
    ]
    return draw_table(header, lines, markdown=markdown)


def measure_corpora(options: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """Measure corpora of several numbers of rows."""
    sizes = sorted(map(int, (options.sizes or "1000,10000,100000,1000000").split(",")))
    sentences = split_sentences(read_texts(options.corpus))
    flags = ("--model", str(options.model), "--outputs", "dense,sparse", "--dtype", options.dtype)
    rows: dict[str, dict[str, Any]] = {}
    for count in sizes:
        corpus = write_rows(work / f"{count}.jsonl", sentences, count=count)
        repeat = options.repeat if count in sizes[-REPEATED:] else 1
        rows[f"{count:,} rows"] = measure_size(corpus, *flags, work=work, repeat=repeat)
        corpus.unlink()
    return rows


def measure_documents(options: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    """Measure shards with documents of several sizes."""
    texts = read_texts(options.corpus)
    flags = ("--model", str(options.model), "--dtype", options.dtype, "--max-length", "512", "--shard-size", "1G")
    rows: dict[str, dict[str, Any]] = {}
    for size in (0.0, *sorted(map(float, (options.sizes or "2.5,5,10,20").split(",")))):
        corpus = write_shard(work / f"{size:g}.jsonl", texts, size=int(size * MB), rows=options.rows)
        rows[f"{size:g} MB"] = measure_size(corpus, *flags, work=work, repeat=1)
        corpus.unlink()
    return rows


def main() -> None:
    """Measure each size and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--documents", action="store_true", help="measure documents of several sizes")
    parser.add_argument("--sizes", help="numbers of rows, or MB of the long document")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5000, help="with --documents: short rows of the shard")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="for corpora and outputs")
    options = parser.parse_args()
    with open_work(options.work) as work:
        rows = (measure_documents if options.documents else measure_corpora)(options, work)
    say("")
    print(draw(rows, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"dtype": options.dtype, "sizes": rows})


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What a document of any size costs: seconds, tokens/s and peak memory of the real `m3 encode`, by its size.

    scripts/bench documents --model DIR --corpus FILE.jsonl [--sizes 2.5,5,10,20] [--rows 5000] [--long-docs chunk]

DIR is meant to be a small model: `scripts/make_demo_model.py DIR --random --layers 1 --hidden 64`. Of each size, in MB,
one shard is written: half of the short rows, a text of that size, a text of half that size without a single white
space, the other short rows. Texts are those of the given corpus, joined, and begun again where it ends; short rows are
its sentences, one to seven a row. The first line has the short rows alone. Where time and memory are linear, what the
others take above it goes up with the size.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson
from speed_bench.command import encode
from speed_bench.running import WORK, open_work, say
from speed_bench.table import draw_table, save_results, show_bytes
from speed_bench.texts import mix_rows, read_texts, split_sentences

MB = 1_000_000


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
    """Write short rows, and if there is a size the two long documents in their midst."""
    short = list(mix_rows(split_sentences(list(texts)), count=rows))
    long = []
    if size:
        whole, joined = join_texts(texts, size=size), join_texts(texts, size=size // 2, blanks=False)
        long = [
            orjson.dumps({"id": name, "text": text}) + b"\n" for name, text in (("long", whole), ("joined", joined))
        ]
    path.write_bytes(b"".join([*short[: rows // 2], *long, *short[rows // 2 :]]))
    return path


def measure_size(corpus: Path, *flags: str, work: Path) -> dict[str, Any]:
    """Encode a corpus as one shard."""
    out = work / "out.m3"
    shutil.rmtree(out, ignore_errors=True)
    done = encode(corpus, out, *flags, "--shard-size", "1G")
    kept = ("documents", "chunks", "tokens", "tokens_per_second", "peak_memory_bytes", "seconds", "skipped")
    shutil.rmtree(out)
    say(f"{corpus.stem}: {done.metrics['tokens_per_second']:,.0f} tokens/s, {done.wall_seconds:.1f} s")
    return {"wall_seconds": done.wall_seconds, **{name: done.metrics[name] for name in kept}}


def draw(rows: dict[float, dict[str, Any]], *, markdown: bool) -> str:
    """Return the table."""
    header = ("MB of the document", "rows", "tokens", "seconds", "tokenising", "tokens/s", "peak memory")
    lines = [
        (
            f"{size:g}",
            f"{row['chunks']:,}",
            f"{row['tokens']:,}",
            f"{row['wall_seconds']:,.1f}",
            f"{row['seconds']['reading']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            show_bytes(row["peak_memory_bytes"]),
        )
        for size, row in rows.items()
    ]
    return draw_table(header, lines, markdown=markdown)


def main() -> None:
    """Measure each size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--sizes", default="2.5,5,10,20", help="MB of the long document")
    parser.add_argument("--rows", type=int, default=5000, help="short rows beside it")
    parser.add_argument("--max-length", default="512")
    parser.add_argument("--long-docs", default="chunk")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="where corpora and outputs lie meanwhile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    texts = read_texts(options.corpus)
    flags = ("--model", options.model, "--max-length", options.max_length, "--long-docs", options.long_docs)
    rows: dict[float, dict[str, Any]] = {}
    with open_work(options.work) as work:
        for size in (0.0, *sorted(map(float, options.sizes.split(",")))):
            corpus = write_shard(work / f"{size:g}.jsonl", texts, size=int(size * MB), rows=options.rows)
            rows[size] = measure_size(corpus, *flags, "--dtype", options.dtype, work=work)
            corpus.unlink()
    say("")
    print(draw(rows, markdown=options.markdown))
    if options.json:
        settings = {"dtype": options.dtype, "max_length": options.max_length, "long_docs": options.long_docs}
        save_results(options.json, {**settings, "short_rows": options.rows, "sizes": rows})


if __name__ == "__main__":
    main()

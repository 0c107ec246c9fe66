"""Whether the host keeps up with a fast device: reading, tokenising, batching and writing; start-up; resuming.

    scripts/bench host --model SMALL --corpus FILE.jsonl [--rows 60000] [--repeat 3]
    scripts/bench host --model SMALL --corpus FILE.jsonl --demo-model DEMO --shards 10000

SMALL is a model that costs next to nothing (`scripts/make_demo_model.py SMALL --random --layers 1 --hidden 64`). T is
the rate of the bare tokenizer (`encode_batch_fast`) and F that of the bare forward pass over packed batches, on the
same cores in the same round as `m3 encode --outputs dense,sparse`. A command that did nothing else would reach
1 / (1/T + 1/F); m3's share of it is the median of the rounds.

With --demo-model: the seconds from process start to exit for one document with that model, with an empty tokenizer
cache (the first time on a machine) and with a filled one, and for one search; next to a program that imports torch,
maps the weights and reads the tokenizer, in the same rounds. With --shards: the seconds that the command takes to find
that none of so many shards remains.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.contest import WORK, encode, open_work, run_m3, say
from benchmarks.m3 import measure_forward, measure_tokenizer
from benchmarks.report import draw_table, format_share, make_parser, save_results
from benchmarks.texts import read_texts, split_sentences, write_rows

SAMPLE = 20_000
"rows of the corpus for T and F"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tokens per second of one round."""

    tokenizer: float
    forward: float
    command: float

    @property
    def bound(self) -> float:
        """Rate of tokenizer and forward pass one after the other."""
        return 1 / (1 / self.tokenizer + 1 / self.forward)

    @property
    def share(self) -> float:
        """Share of the bound that the command reached."""
        return self.command / self.bound


def measure_rounds(options: argparse.Namespace, corpus: Path, work: Path) -> list[Round]:
    """Measure T, F and the command in turn."""
    with corpus.open("rb") as file:
        texts = [orjson.loads(line)["text"] for _, line in zip(range(SAMPLE), file, strict=False)]
    rounds = []
    for _ in range(options.repeat):
        out = work / "host.m3"
        shutil.rmtree(out, ignore_errors=True)
        flags = ("--model", str(options.model), "--outputs", "dense,sparse", "--dtype", options.dtype)
        rounds.append(
            Round(
                tokenizer=measure_tokenizer(options.model, texts),
                forward=measure_forward(options.model, texts, dtype=options.dtype),
                command=encode(corpus, out, *flags).metrics["tokens_per_second"],
            )
        )
        say(f"T {rounds[-1].tokenizer:,.0f}, F {rounds[-1].forward:,.0f}, m3 encode {rounds[-1].command:,.0f}")
    return rounds


BARE = """import sys, torch, tokenizers
from safetensors.torch import load_file
weights = load_file(sys.argv[1] + "/model.safetensors")
tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
"""
"what every command with a model does at least"


def measure_start(model: Path, corpus: Path, work: Path, *, rounds: int) -> dict[str, float]:
    """Return the seconds for one document with an empty tokenizer cache; the medians with a filled one, and others."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    flags = ("--model", str(model))
    one = work / "one.jsonl"
    one.write_bytes(corpus.read_bytes().splitlines(keepends=True)[0])
    first = encode(one, work / "first.m3", *flags, environment=environment).wall_seconds
    query = ("search", str(work / "first.m3"), "--mode", "dense", "words")
    found: dict[str, list[float]] = {"bare": [], "encode": [], "search": []}
    for number in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", BARE, str(model)], check=True)
        found["bare"].append(time.perf_counter() - began)
        made = encode(one, work / f"{number}.m3", *flags, environment=environment)
        found["encode"].append(made.wall_seconds)
        found["search"].append(run_m3(*query, environment=environment))
    return {"encode, empty cache": first, **{name: statistics.median(each) for name, each in found.items()}}


def measure_resume(model: Path, work: Path, *, shards: int) -> float:
    """Return the seconds that the command takes over `shards` finished ones; making them takes longer."""
    line = '{"id": "%06d", "text": "Nothing is left to do."}\n'
    corpus, out = work / "shards.jsonl", work / "shards.m3"
    corpus.write_text("".join(line % number for number in range(shards)), encoding="utf-8")
    flags = ("--model", str(model), "--outputs", "dense", "--shard-size", str(len(line % 0)))
    say(f"making {shards:,} shards")
    encode(corpus, out, *flags)
    return run_m3("encode", str(corpus), "--out", str(out), "--progress", "none", *flags)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=60_000, help="made of the corpus's sentences")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--demo-model", type=Path, help="measure start-up with it")
    parser.add_argument("--shards", type=int, default=0, help="measure a resume over so many")
    parser.add_argument("--work", type=Path, default=WORK, help="for corpora and outputs")
    options = parser.parse_args()
    with open_work(options.work) as work:
        corpus = write_rows(work / "host.jsonl", split_sentences(read_texts(options.corpus)), count=options.rows)
        rounds = measure_rounds(options, corpus, work)
        header = ("round", "tokenizer alone", "forward alone", "bound", "m3 encode", "of the bound")
        lines = [
            (
                str(number),
                *(f"{rate:,.0f}" for rate in (one.tokenizer, one.forward, one.bound, one.command)),
                format_share(one.share),
            )
            for number, one in enumerate(rounds, 1)
        ]
        print(draw_table(header, lines, markdown=options.markdown))
        results: dict[str, Any] = {"dtype": options.dtype, "rounds": [asdict(one) for one in rounds]}
        results["share"] = statistics.median(one.share for one in rounds)
        print(f"\nmedian: {format_share(results['share'])} of the bound")
        if options.demo_model:
            results["start_seconds"] = found = measure_start(options.demo_model, corpus, work, rounds=options.repeat)
            told = (f"{name} {seconds:.1f} s, {seconds / found['bare']:.2f}" for name, seconds in found.items())
            print(f"one document or query, and times the bare program: {'; '.join(told)}")
        if options.shards:
            seconds = measure_resume(options.model, work, shards=options.shards)
            results["resume"] = {"shards": options.shards, "seconds": seconds}
            print(f"nothing to do: {seconds:.1f} s over {options.shards:,} shards")
    if options.json:
        save_results(options.json, results)


if __name__ == "__main__":
    main()

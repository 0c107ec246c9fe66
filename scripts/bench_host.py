#!/usr/bin/env python3
"""Whether the host keeps up with a fast device: reading, tokenising, batching and writing; start-up; resuming.

    scripts/bench host --model SMALL --corpus FILE.jsonl [--rows 60000] [--repeat 3]
    scripts/bench host --model SMALL --corpus FILE.jsonl --demo-model DEMO --shards 10000

SMALL is a model that costs next to nothing (`scripts/make_demo_model.py SMALL --random --layers 1 --hidden 64`). With
T the rate of the bare tokenizer (`encode_batch_fast`) and F that of the bare forward pass over packed batches, taken on
the same cores in the same round as `m3 encode --outputs dense,sparse`, a command that did nothing else would reach
1 / (1/T + 1/F); what share of it m3 reaches is the median of the rounds.

With --demo-model: the seconds from process start to the first batch going into that model, with an empty tokenizer
cache (the first time on a machine) and with a filled one. With --shards: the seconds that the command takes to find
that of so many shards none is left to do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch
from speed_bench.command import encode, time_first_batch
from speed_bench.m3 import make_documents
from speed_bench.running import WORK, open_work, say
from speed_bench.table import draw_table, save_results, show_share
from speed_bench.texts import read_texts, split_sentences, write_rows

from m3cli.ahead import map_lanes
from m3cli.config import Dtype
from m3cli.encoder.batcher import pack_batches
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import Cutting, chunk_documents
from m3cli.encoder.device import auto_batch_tokens, auto_threads, plan_lanes, set_threads
from m3cli.encoder.model import Model, load_model, run_model
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer

SAMPLE = 20_000
"rows of the corpus that T and F are taken on"
WARM_UP_BATCHES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tokens a second of one round."""

    tokenizer: float
    forward: float
    command: float

    @property
    def bound(self) -> float:
        """What tokenizer and forward pass one after the other would reach."""
        return 1 / (1 / self.tokenizer + 1 / self.forward)

    @property
    def share(self) -> float:
        """What share of the bound the command reached."""
        return self.command / self.bound


def rate_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return the tokens/s of the backend alone, its Encoding objects neither read nor freed."""
    began = time.perf_counter()
    encodings = tokenizer.backend.encode_batch_fast(texts)
    seconds = time.perf_counter() - began
    return sum(len(encoding.ids) for encoding in encodings) / seconds


@torch.inference_mode()
def rate_forward(model: Model, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return the tokens/s of the model alone over packed batches, as many at once as `m3 encode` has."""
    cutting = Cutting(max_length=model.checkpoint.default_max_length)
    chunks = chunk_documents(make_documents(texts), tokenizer, cutting)
    budget = auto_batch_tokens("cpu")
    batches = list(pack_batches(chunks, start=0, stop=chunks.num_rows, max_batch_tokens=budget))
    threads = auto_threads()
    lanes = plan_lanes(threads, device="cpu")
    set_threads(threads // lanes)
    run = partial(run_model, model)
    try:
        deque(map_lanes(run, batches[:WARM_UP_BATCHES], lanes=lanes, name="forward"), maxlen=0)
        began = time.perf_counter()
        deque(map_lanes(run, batches, lanes=lanes, name="forward"), maxlen=0)
        return len(chunks.input_ids) / (time.perf_counter() - began)
    finally:
        set_threads(threads)


def measure_rounds(options: argparse.Namespace, corpus: Path, work: Path) -> list[Round]:
    """Take T, F and the command in turn."""
    checkpoint = read_checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, device="cpu", dtype=options.dtype)
    with corpus.open("rb") as file:
        texts = [orjson.loads(line)["text"] for _, line in zip(range(SAMPLE), file, strict=False)]
    rounds = []
    for _ in range(options.repeat):
        out = work / "host.m3"
        shutil.rmtree(out, ignore_errors=True)
        flags = ("--model", str(options.model), "--outputs", "dense,sparse", "--dtype", options.dtype)
        rounds.append(
            Round(
                tokenizer=rate_tokenizer(tokenizer, texts),
                forward=rate_forward(model, tokenizer, texts),
                command=encode(corpus, out, *flags).metrics["tokens_per_second"],
            )
        )
        say(f"T {rounds[-1].tokenizer:,.0f}, F {rounds[-1].forward:,.0f}, m3 encode {rounds[-1].command:,.0f}")
    return rounds


def measure_start(model: Path, corpus: Path, work: Path) -> dict[str, float]:
    """Return the seconds to the first batch with an empty and with a filled tokenizer cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    flags = ("--model", str(model), "--limit", "100")
    return {
        cache: time_first_batch(corpus, work / f"{cache}.m3", *flags, environment=environment)
        for cache in ("empty", "filled")
    }


def measure_resume(model: Path, work: Path, *, shards: int) -> float:
    """Return the seconds that the command takes over `shards` done ones; making them takes longer."""
    line = '{"id": "%06d", "text": "Nothing is left to do."}\n'
    corpus, out = work / "shards.jsonl", work / "shards.m3"
    corpus.write_text("".join(line % number for number in range(shards)), encoding="utf-8")
    flags = ("--model", str(model), "--outputs", "dense", "--shard-size", str(len(line % 0)))
    say(f"making {shards:,} shards")
    done = encode(corpus, out, *flags).metrics["num_files"]
    assert done >= shards, f"{done} files, not {shards} shards"
    return encode(corpus, out, *flags).wall_seconds


def main() -> None:
    """Measure what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=60_000, help="made of the corpus's sentences")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=Dtype.__args__)  # type: ignore[attr-defined]
    parser.add_argument("--demo-model", type=Path, help="measure start-up with it")
    parser.add_argument("--shards", type=int, default=0, help="measure a resume over so many")
    parser.add_argument("--work", type=Path, default=WORK, help="where corpora and outputs lie meanwhile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with open_work(options.work) as work:
        corpus = write_rows(work / "host.jsonl", split_sentences(read_texts(options.corpus)), count=options.rows)
        rounds = measure_rounds(options, corpus, work)
        header = ("round", "tokenizer alone", "forward alone", "bound", "m3 encode", "of the bound")
        lines = [
            (
                str(number),
                *(f"{rate:,.0f}" for rate in (one.tokenizer, one.forward, one.bound, one.command)),
                show_share(one.share),
            )
            for number, one in enumerate(rounds, 1)
        ]
        print(draw_table(header, lines, markdown=options.markdown))
        results |= {"dtype": options.dtype, "rounds": [asdict(one) for one in rounds]}
        results["share"] = statistics.median(one.share for one in rounds)
        print(f"\nmedian: {show_share(results['share'])} of the bound")
        if options.demo_model:
            results["first_batch_seconds"] = found = measure_start(options.demo_model, corpus, work)
            told = ", ".join(f"{seconds:.1f} s with the tokenizer cache {cache}" for cache, seconds in found.items())
            print(f"first batch after {told}")
        if options.shards:
            results["resume"] = {
                "shards": options.shards,
                "seconds": measure_resume(options.model, work, shards=options.shards),
            }
            print(f"nothing to do, found in {results['resume']['seconds']:.1f} s over {options.shards:,} shards")
    if options.json:
        save_results(options.json, results)


if __name__ == "__main__":
    main()

"""How busy `m3 encode` keeps a device, and what the host spends: the real command with a simulated device.

    scripts/bench busy --model SMALL --corpus FILE.jsonl [--tokens 3000000] [--lengths 30,250] [--ms 5.7]

The model is replaced by one whose forward pass takes so many milliseconds per 1,000 tokens, without using the host, as
a GPU's does (5.7 is a quarter of an H200, for two cores), and gives random outputs 1,024 wide. Everything else is real:
tokenizer, batches, writer, threads. Of SMALL only the tokenizer counts.

Busy is the device's work over the time from its first batch to its last. Core-milliseconds per million tokens are
those of a stage's own thread; the last column is the whole process, the tokenizer's threads included.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contest import WORK, open_work, say
from benchmarks.report import draw_table, format_share, make_parser, save_results
from benchmarks.texts import cut_texts, read_texts
from m3cli.cli.app import run
from m3cli.encoder import chunker, device, model, tokenizer
from m3cli.encoder import encode as encoding
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.heads import NO_KEY, OutputOptions
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.jobs.encode import pipeline
from m3cli.records import Batch
from m3cli.store.folder import ShardWriter

WIDTH = 1024
PIECES = 2000
"distinct texts"
OUTPUTS = ("dense,sparse", "dense,sparse,colbert")
STAGES: tuple[tuple[Any, str, str], ...] = (
    (tokenizer.Tokenizer, "encode", "ids to arrays"),
    (chunker, "_to_chunks", "chunk arrays"),
    (pipeline, "batch_rows", "batches"),
    (pipeline, "pack_rows", "batches"),
    (encoding, "build_embeddings", "results"),
    (encoding, "_find_errors", "results"),
    (pipeline, "compress_rows", "compress"),
    (pipeline, "restore_order", "order"),
    (ShardWriter, "append", "write"),
    (ShardWriter, "finish", "write"),
)
"owner and name of a function, and the stage it is counted for"


class Device:
    """Runs batches one after the other, without the host."""

    def __init__(self, seconds_per_token: float) -> None:
        self._seconds = seconds_per_token
        self._weights = np.random.default_rng(0).random(1 << 20, np.float32)
        self._vectors = np.random.default_rng(0).standard_normal((1 << 17, WIDTH)).astype(np.float16)
        self._bytes = np.random.default_rng(0).integers(0, 256, (1 << 17, WIDTH), np.uint8)
        self.work = 0.0
        self.first = self.free = 0.0
        "perf_counter at which the first batch began, and at which the last one ends"

    def launch(self, _model: object, batch: Batch) -> tuple[float, None]:
        """Queue a batch, as `run_model`; return the time at which it ends."""
        now = time.perf_counter()
        self.first = self.first or now
        seconds = self._seconds * len(batch.input_ids)
        self.work += seconds
        self.free = max(now, self.free) + seconds
        return self.free, None

    def make_outputs(
        self, _model: object, batch: Batch, ready: float, _layout: None, options: OutputOptions
    ) -> tuple[float, dict[str, NDArray[Any]]]:
        """Return random outputs, as `run_heads`, and the time at which they are on the host."""
        tokens, rows = len(batch.input_ids), len(batch.rows)
        outputs: dict[str, NDArray[Any]] = {"finite": np.ones(tokens, np.bool_)}
        if "dense" in options.outputs:
            outputs["dense_vecs"] = self._vectors[:rows].astype(options.dense_dtype, copy=False)
        if "sparse" in options.outputs:
            numbers = np.repeat(np.arange(rows), np.diff(batch.cu_seqlens))
            keys = np.unique((numbers << 32) | batch.input_ids)
            outputs["lexical_keys"] = np.full(tokens, NO_KEY)
            outputs["lexical_keys"][: len(keys)] = keys
            outputs["lexical_values"] = self._weights[:tokens]
        if "colbert" in options.outputs:
            vectors = self._vectors[: tokens - rows]
            if options.quantise is not None:
                outputs["colbert_errors"] = np.zeros(len(vectors), np.uint8)
                if options.quantise == "int8":
                    outputs["colbert_scales"] = self._weights[: len(vectors)]
                    outputs["colbert_vecs"] = self._bytes[: len(vectors)].view(np.int8)
                else:
                    outputs["colbert_vecs"] = self._bytes[: len(vectors), : WIDTH // 8]
            else:
                outputs["colbert_vecs"] = vectors.astype(options.colbert_dtype, copy=False)
        return ready, outputs


class Fetched:
    """Outputs that are on the host when their batch has ended."""

    def __init__(self, outputs: tuple[float, dict[str, NDArray[Any]]], _stream: object) -> None:
        self._ready, self._outputs = outputs

    def wait(self) -> Mapping[str, NDArray[Any]]:
        """Sleep until the batch has ended."""
        time.sleep(max(0.0, self._ready - time.perf_counter()))
        return self._outputs


def encode(corpus: Path, out: Path, folder: Path, *flags: str, ms: float) -> dict[str, Any]:
    """Run `m3 encode` in this process with a simulated device; return its numbers."""
    simulated = Device(ms / 1e6)
    checkpoint = replace(read_checkpoint(folder), hidden_size=WIDTH)
    stand_in = argparse.Namespace(device=torch.device("cuda"), dtype=torch.float16, checkpoint=checkpoint)
    spent: defaultdict[str, float] = defaultdict(float)

    def count(function: Any, stage: str) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent[stage] += time.thread_time() - began

        return counted

    with ExitStack() as stack:
        for owner, name, stand in (
            (model, "load_model", lambda *_, **__: stand_in),
            (device, "plan_threads", lambda *_, **__: 1),
            (encoding, "open_stream", lambda _: None),
            (encoding, "run_model", simulated.launch),
            (encoding, "run_heads", simulated.make_outputs),
            (encoding, "fetch", Fetched),
            (encoding.BatchEncoder, "warm_up", lambda *_, **__: None),
            *((owner, name, count(getattr(owner, name), stage)) for owner, name, stage in STAGES),
        ):
            stack.enter_context(patch.object(owner, name, stand, create=name == "warm_up"))
        began = time.process_time()
        words = ("encode", corpus, "--out", out, "--model", folder, "--dtype", "float16", "--progress", "none", *flags)
        code = run(list(map(str, words)))
        total = time.process_time() - began
    if code:
        raise SystemExit(code)
    metrics = json.loads((out / "_m3" / "metrics.json").read_text(encoding="utf-8"))
    millions = metrics["tokens"] / 1e6
    return {
        "tokens": metrics["tokens"],
        "tokens_per_second": metrics["tokens_per_second"],
        "busy": simulated.work / (simulated.free - simulated.first),
        "core_ms": {stage: 1e3 * seconds / millions for stage, seconds in spent.items()},
        "process_core_ms": 1e3 * total / millions,
    }


def write_corpus(path: Path, texts: list[str], folder: Path, *, length: int, tokens: int) -> Path:
    """Write a corpus of so many tokens in rows of `length` tokens."""
    count = tokens // length
    pieces = cut_texts(texts, load_tokenizer(read_checkpoint(folder)).backend, length=length, count=min(PIECES, count))
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"id": str(number), "text": draw.choice(pieces)}) + "\n")
    return path


def widen(folder: Path, out: Path) -> Path:
    """Return a copy of a checkpoint that says it is as wide as the simulated outputs; its weights are never read."""
    out.mkdir()
    for path in folder.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, out / path.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": WIDTH, "num_attention_heads": 16}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of a corpus")
    parser.add_argument("--lengths", default="30,250", help="tokens of a row")
    parser.add_argument("--outputs", nargs="+", default=OUTPUTS)
    parser.add_argument("--flags", default="", help="more options of m3 encode, such as --colbert-dtype int8")
    parser.add_argument("--shard-size", default="8M")
    parser.add_argument("--batch", type=int, default=65536, help="tokens of a batch")
    parser.add_argument("--ms", type=float, default=5.7, help="of the device for 1,000 tokens")
    parser.add_argument("--work", type=Path, default=WORK, help="for corpora and outputs")
    options = parser.parse_args()
    results = []
    with open_work(options.work) as work:
        folder, texts = widen(options.model, work / "model"), read_texts(options.corpus)
        for length in map(int, options.lengths.split(",")):
            corpus = write_corpus(work / f"{length}.jsonl", texts, folder, length=length, tokens=options.tokens)
            for outputs in options.outputs:
                flags = ("--outputs", outputs, "--shard-size", options.shard_size, *options.flags.split())
                flags += ("--max-batch-tokens", str(options.batch))
                found = encode(corpus, work / "out.m3", folder, *flags, ms=options.ms)
                shutil.rmtree(work / "out.m3")
                results.append({"length": length, "outputs": outputs, **found})
                say(f"{outputs}, {length} tokens a row: busy {found['busy']:.1%}")
    stages = list(dict.fromkeys(stage for found in results for stage in found["core_ms"]))
    rows = [
        (
            f"{found['outputs']}, {found['length']}",
            format_share(found["busy"]),
            f"{found['tokens_per_second']:,.0f}",
            *(f"{found['core_ms'].get(stage, 0.0):.0f}" for stage in stages),
            f"{found['process_core_ms']:,.0f}",
        )
        for found in results
    ]
    print(draw_table(("", "busy", "tokens/s", *stages, "all"), rows, markdown=options.markdown))
    if options.json:
        save_results(options.json, {"ms_per_1000_tokens": options.ms, "runs": results})


if __name__ == "__main__":
    main()

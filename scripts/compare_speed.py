#!/usr/bin/env python3
"""Tokens a second of m3 and its peers, on the same texts and checkpoint, loading excluded, in one run.

m3 runs its own stages (tokenise, batch, encode, bring rows into order) in memory for dense + sparse + ColBERT, in
float32 and bfloat16. FlagEmbedding runs `encode` for all three at several batch sizes, in float32 (it has no bfloat16
on a CPU); the best one counts. sentence-transformers gives dense vectors only. The machine's own matmul rate,
[4096 x 1024] . [1024 x 4096], is taken before and after, the better counts; a model's share of it is its FLOPs
(24 C^2 a token and layer, and 4 C L for attention at length L) by the second.

Each contender runs in a process of its own and is timed there; on a noisy machine compare within one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from m3cli.encoder.batcher import pack_batches
from m3cli.encoder.checkpoint import Checkpoint, read_checkpoint
from m3cli.encoder.chunker import chunk_documents
from m3cli.encoder.encode import encode_batch
from m3cli.encoder.model import load_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.encoder.window import order_rows
from m3cli.records import Document

FLAG_BATCHES = (8, 16, 32, 64)
CONTENDERS = ("m3 float32", "m3 bfloat16", *(f"FlagEmbedding {size}" for size in FLAG_BATCHES), "sentence-transformers")
Run = Callable[[], object]


def read_texts(path: Path, documents: int) -> list[str]:
    """Read the first texts of a JSONL corpus that are no mere phrases (40 characters and more)."""
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    texts = [f"{row.get('title') or ''}\n{row['text']}".strip() for row in rows if len(row["text"]) >= 40]
    step = max(1, len(texts) // documents)
    return texts[::step][:documents]


def prepare_m3(checkpoint: Checkpoint, texts: list[str], dtype: Any) -> Run:
    """Return a run of m3's stages over all texts."""
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, device="cpu", dtype=dtype)
    documents = [
        Document(id="", position=place, text=text, text_hash=(0, 0), has_own_id=True)
        for place, text in enumerate(texts)
    ]

    def run() -> None:
        chunks = chunk_documents(documents, tokenizer, max_length=checkpoint.default_max_length, long_docs="truncate")
        made = (
            part
            for batch in pack_batches(chunks, start=0, stop=chunks.num_rows, max_batch_tokens=8192)
            for part in encode_batch(
                model, batch, outputs=("dense", "sparse", "colbert"), special_ids=tokenizer.special_ids
            )
        )
        order_rows(made, chunks, start=0, stop=chunks.num_rows)

    return run


def prepare_flagembedding(checkpoint: Checkpoint, texts: list[str], batch: int) -> Run:
    """Return a run of FlagEmbedding's `encode` over all texts, all three outputs."""
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  each contender loads its own library only

    model = BGEM3FlagModel(str(checkpoint.folder), use_fp16=False, devices="cpu")
    length = checkpoint.default_max_length
    return lambda: model.encode(
        texts, batch_size=batch, max_length=length, return_dense=True, return_sparse=True, return_colbert_vecs=True
    )


def prepare_sentence_transformers(checkpoint: Checkpoint, texts: list[str]) -> Run:
    """Return a run of sentence-transformers' `encode` over all texts in bfloat16, dense only."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    model = SentenceTransformer(str(checkpoint.folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    return lambda: model.encode(texts, batch_size=16, convert_to_numpy=False, show_progress_bar=False)


def measure(contender: str, checkpoint: Checkpoint, texts: list[str]) -> float:
    """Return the seconds a contender takes for all texts, after a warm-up on a few."""
    name, _, setting = contender.partition(" ")

    def prepare(some: list[str]) -> Run:
        if name == "m3":
            return prepare_m3(checkpoint, some, setting)
        if name == "FlagEmbedding":
            return prepare_flagembedding(checkpoint, some, int(setting))
        return prepare_sentence_transformers(checkpoint, some)

    prepare(texts[:8])()
    run = prepare(texts)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure_matmul(dtype: torch.dtype) -> float:
    """Return the best FLOP/s of [4096 x 1024] . [1024 x 4096]."""
    left, right = torch.randn(4096, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    best = 0.0
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * 4096 * 1024 * 4096 / (time.perf_counter() - began))
    return best


def count_flops(checkpoint: Checkpoint, lengths: np.ndarray) -> float:
    """Count a forward pass's FLOPs over rows of these lengths, attention included, embeddings and heads not."""
    width = checkpoint.hidden_size
    return float(
        checkpoint.num_layers * (24 * width**2 * lengths.sum() + 4 * width * (lengths.astype(float) ** 2).sum())
    )


def run_apart(contender: str, arguments: argparse.Namespace) -> float | str:
    """Measure a contender in a process of its own; a word where it cannot run."""
    command = [sys.executable, __file__, "--model", arguments.model, "--corpus", arguments.corpus]
    command += ["--documents", str(arguments.documents), "--only", contender]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    return float(last[0]) if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}"


def main() -> None:
    """Measure all contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--json")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint, texts = read_checkpoint(Path(arguments.model)), read_texts(Path(arguments.corpus), arguments.documents)
    if arguments.only:
        print(measure(arguments.only, checkpoint, texts))
        return
    rates = {name: measure_matmul(getattr(torch, name)) for name in ("float32", "bfloat16")}
    lengths = np.array([len(ids) for ids in load_tokenizer(checkpoint).encode(texts)]).clip(max=checkpoint.max_length)
    seconds = {contender: run_apart(contender, arguments) for contender in CONTENDERS}
    rates = {name: max(rate, measure_matmul(getattr(torch, name))) for name, rate in rates.items()}
    tokens, flops = int(lengths.sum()), count_flops(checkpoint, lengths)
    print(f"{len(texts)} texts, {tokens:,} tokens; {checkpoint.num_layers} layers, {checkpoint.hidden_size} wide")
    print("matmul " + ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()))
    for contender, spent in seconds.items():
        if isinstance(spent, str):
            print(f"{contender:24} {spent}")
            continue
        rate = rates["float32" if contender == "m3 float32" or contender.startswith("Flag") else "bfloat16"]
        print(f"{contender:24} {tokens / spent:9,.0f} tokens/s {100 * flops / spent / rate:5.0f} % of matmul")
    if arguments.json:
        found = {"texts": len(texts), "tokens": tokens, "flops": flops, "matmul": rates, "seconds": seconds}
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""m3's own stages in memory, its tokenizer and its forward pass alone, and the machine's matmul rates.

Of the benches only this module, `stored`, `busy`, `gpu` and `kernels` import m3cli's internals.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch

from benchmarks.contest import Group, Made, Runner
from m3cli.concurrency import parallel_map
from m3cli.config import Dtype
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import Cutting, chunk_documents
from m3cli.encoder.device import (
    INT8,
    auto_batch_tokens,
    auto_threads,
    cpu_has,
    plan_threads,
    set_threads,
    time_matmul,
)
from m3cli.encoder.embeddings import restore_order
from m3cli.encoder.encode import BatchEncoder, FailedRow, batch_rows, pack_rows
from m3cli.encoder.heads import OutputOptions
from m3cli.encoder.linear import make_int8_linear, make_linear
from m3cli.encoder.model import load_model, padded_num_tokens, run_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.jobs.texts import plan_at_once
from m3cli.records import Document, Output

OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")
WARM_UP_BATCHES = 20
SQUARE = "float16 at 8192^3"


def load_m3(folder: Path, dtype: str, outputs: str = ",".join(OUTPUTS), *, device: str) -> Runner:
    """Return a run of tokenising, batching, encoding and ordering, one after the other.

    Batches run in parallel as in `m3 encode`, which overlaps the other stages with them; here nothing overlaps. Few
    texts run with all threads as one batch, as in m3 from Python.
    """
    checkpoint = read_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, device=device, dtype=cast("Dtype", dtype))
    cutting = Cutting(max_length=checkpoint.default_max_length, long_docs="truncate")
    budget = auto_batch_tokens(device)
    wanted = cast("tuple[Output, ...]", tuple(outputs.split(",")))
    options = OutputOptions(outputs=wanted, special_ids=tokenizer.special_ids)
    threads = auto_threads()
    encoders = {
        count: BatchEncoder(model, options, num_threads=count, parallel_map=parallel_map)
        for count in {1, plan_threads(threads, device=device)}
    }

    def run(group: Group) -> Made:
        clock = [time.perf_counter()]
        chunks = chunk_documents(make_documents(group.texts), tokenizer, cutting)
        parallel = plan_at_once(chunks.num_tokens, threads=threads, device=device)
        set_threads(threads // parallel)
        clock.append(time.perf_counter())
        groups = batch_rows(chunks.num_tokens, max_batch_tokens=budget, threads=parallel)
        batches = [pack_rows(chunks, rows) for rows in groups]
        clock.append(time.perf_counter())
        parts = [part for part in encoders[parallel].encode_all(batches) if not isinstance(part, FailedRow)]
        clock.append(time.perf_counter())
        restore_order(parts, start=0, stop=chunks.num_rows)
        clock.append(time.perf_counter())
        spent = (after - before for before, after in pairwise(clock))
        return Made(
            positions=sum(padded_num_tokens(len(batch.input_ids), device=model.device) for batch in batches),
            stages=dict(zip(("tokenising", "batching", "encoding", "ordering"), spent, strict=True)),
        )

    return run


def load_tokenizer_alone(folder: Path) -> Runner:
    """Return a run of the backend's `encode_batch_fast`, which uses all cores."""
    backend = load_tokenizer(read_checkpoint(folder)).backend

    def run(group: Group) -> Made:
        backend.encode_batch_fast(group.texts)
        return Made(positions=group.tokens)

    return run


def make_documents(texts: list[str]) -> list[Document]:
    """Make documents of texts."""
    return [
        Document(id="", position=place, text=text, text_hash=(0, 0), has_own_id=True)
        for place, text in enumerate(texts)
    ]


def measure_rates(device: str) -> dict[str, float]:
    """Return FLOP/s by dtype of [4096 x 1024] . [1024 x 4096], BGE-M3's widest matmul.

    On a CPU the weights are laid out once, as the encoder's are, and the best round counts. On a GPU it has the rows of
    a full batch and runs for a second, and a square one too, as their rates differ.
    """
    if device == "cpu":
        dtypes = ("float32", "bfloat16", *(("int8",) if cpu_has(INT8) else ()))
        return {dtype: measure_linear(dtype) for dtype in dtypes}
    sustained = partial(time_matmul, device, seconds=1.0, calls=10, best=False)
    return {
        "bfloat16": sustained("bfloat16", rows=65536),
        "float16": sustained("float16", rows=65536),
        SQUARE: sustained("float16", rows=8192, width=8192, columns=8192),
    }


@torch.inference_mode()
def measure_linear(dtype: str, *, tokens: int = 4096, width: int = 1024, inner: int = 4096) -> float:
    """Return FLOP/s of the best round in a second of a linear map alone; in int8, of states that are quantised."""
    states, weight, bias = torch.randn(tokens, width), torch.randn(inner, width) / width**0.5, torch.zeros(inner)
    if dtype == "int8":
        quantised = make_int8_linear(weight, bias, dtype=torch.bfloat16, after_gelu=False)
        levels, _, zero_point = quantised.quantise(states)
        call = partial(quantised.multiply, levels, zero_point)
    else:
        kind = getattr(torch, dtype)
        call = partial(make_linear(weight.to(kind), bias.to(kind)).apply, states.to(kind))
    call()
    rounds = list[float]()
    while sum(rounds) < 1:
        began = time.perf_counter()
        call()
        rounds.append(time.perf_counter() - began)
    return 2.0 * tokens * width * inner / min(rounds)


def measure_tokenizer(model: Path, texts: list[str]) -> float:
    """Return the tokens/s of the tokenizer's backend alone."""
    backend = load_tokenizer(read_checkpoint(model)).backend
    began = time.perf_counter()
    encodings = backend.encode_batch_fast(texts)
    seconds = time.perf_counter() - began
    return sum(len(encoding.ids) for encoding in encodings) / seconds


@torch.inference_mode()
def measure_forward(folder: Path, texts: Sequence[str], *, dtype: str) -> float:
    """Return the tokens/s of the model alone over packed batches, as many at once as `m3 encode` runs."""
    checkpoint = read_checkpoint(folder)
    model = load_model(checkpoint, device="cpu", dtype=cast("Dtype", dtype))
    cutting = Cutting(max_length=checkpoint.default_max_length)
    chunks = chunk_documents(make_documents(list(texts)), load_tokenizer(checkpoint), cutting)
    threads = auto_threads()
    parallel = plan_threads(threads, device="cpu")
    rows = batch_rows(chunks.num_tokens, max_batch_tokens=auto_batch_tokens("cpu"), threads=parallel)
    batches = [pack_rows(chunks, some) for some in rows]
    set_threads(threads // parallel)
    run = partial(run_model, model)
    try:
        deque(parallel_map(run, batches[:WARM_UP_BATCHES], threads=parallel, name="forward"), maxlen=0)
        began = time.perf_counter()
        deque(parallel_map(run, batches, threads=parallel, name="forward"), maxlen=0)
        return len(chunks.input_ids) / (time.perf_counter() - began)
    finally:
        set_threads(threads)

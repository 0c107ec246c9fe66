"""Load one contender in this process, warm it up, run each group of texts, print JSON.

    python -m benchmarks.contender MODEL NAME CACHE DEVICE < GROUPS.json

NAME is a kind and its settings: `m3 bfloat16`, `m3 float16 dense,sparse`, `FlagEmbedding 16`,
`sentence-transformers float32 16`,
`onnxruntime int8 2048`, `OpenVINO bfloat16 4096`, `tokenizer`, `matmul`, `export`. Standard input is a list of
benchmarks.contest.Group. For each group one object is printed: seconds, the positions that the model ran, seconds by
stage if the contender has stages, and the most memory that the process has held so far, in bytes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.contest import Found, Group, Runner, read_host_peak

WARM_UP_TEXTS = 8
WARM_UP_TOKENS = 2 * 65536
"on a GPU: two full batches, in which memory is allocated and kernels are chosen"


def load(name: str, model: Path, cache: Path, device: str) -> Runner:
    """Load a contender; only its own libraries are imported."""
    kind, *settings = name.split()
    if kind in ("m3", "tokenizer"):
        from benchmarks import m3  # noqa: PLC0415  each contender loads its own library only

        return m3.load_m3(model, *settings, device=device) if kind == "m3" else m3.load_tokenizer_alone(model)
    from benchmarks import peers  # noqa: PLC0415

    if kind in ("FlagEmbedding", "sentence-transformers"):
        return (peers.load_flagembedding if kind == "FlagEmbedding" else peers.load_sentence_transformers)(
            model, *settings, device=device
        )
    return (peers.load_onnxruntime if kind == "onnxruntime" else peers.load_openvino)(model, *settings, cache=cache)


def time_group(run: Runner, group: Group, *, device: str) -> Found:
    """Time a run over a group, the median of several if it says so, after a run over a few of its texts."""
    count = WARM_UP_TEXTS
    if device != "cpu":
        count += next((place for place, sum_ in enumerate(accumulate(group.lengths)) if sum_ >= WARM_UP_TOKENS), 0)
    few = Group(texts=group.texts[:count], lengths=group.lengths[:count], batch=group.batch)
    run(few)
    rounds, end = list[float](), time.perf_counter() + group.seconds
    while not rounds or time.perf_counter() < end:
        began = time.perf_counter()
        made = run(group)
        rounds.append(time.perf_counter() - began)
    return Found(seconds=median(rounds), positions=made.positions, stages=made.stages, peak_bytes=read_peak(device))


def read_peak(device: str) -> int:
    """Return the most memory this process has held, in bytes: of the device, if it has its own."""
    return read_host_peak() if device == "cpu" else torch.cuda.max_memory_allocated(device)


def answer(name: str, model: Path, cache: Path, device: str) -> Any:
    """Run what a name stands for."""
    if name == "matmul":
        from benchmarks.m3 import measure_rates  # noqa: PLC0415

        return measure_rates(device)
    if name == "export":
        from benchmarks.peers import export  # noqa: PLC0415

        return str(export(model, cache))
    run = load(name, model, cache, device)
    return [asdict(time_group(run, Group(**group), device=device)) for group in json.load(sys.stdin)]


if __name__ == "__main__":
    _, given_model, given_name, given_cache, given_device = sys.argv
    print(json.dumps(answer(given_name, Path(given_model), Path(given_cache), given_device)))

"""m3's own stages in memory, and its tokenizer alone."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import cast

from m3cli.ahead import map_lanes
from m3cli.config import Dtype
from m3cli.encoder.batcher import batch_rows, pack_rows
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import Cutting, chunk_documents
from m3cli.encoder.device import auto_batch_tokens, auto_threads, plan_lanes, set_threads
from m3cli.encoder.encode import BatchEncoder, FailedRow
from m3cli.encoder.model import fill_up, load_model
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.encoder.window import order_rows
from m3cli.records import Document, Output
from speed_bench.records import Group, Made, Runner

OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")


def load_m3(folder: Path, dtype: str, outputs: str = ",".join(OUTPUTS), *, device: str) -> Runner:
    """Return a run of tokenising, batching, encoding and ordering, one after the other.

    Batches go side by side as `m3 encode` has them go; it does all else in threads beside that, here nothing is hidden.
    """
    checkpoint = read_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, device=device, dtype=cast("Dtype", dtype))
    threads = auto_threads()
    lanes = plan_lanes(threads, device=device)
    set_threads(threads // lanes)
    cutting = Cutting(max_length=checkpoint.default_max_length, long_docs="truncate")
    budget = auto_batch_tokens(device)
    wanted = cast("tuple[Output, ...]", tuple(outputs.split(",")))
    encoder = BatchEncoder(model, outputs=wanted, special_ids=tokenizer.special_ids)
    if lanes > 1:
        encoder.spread = partial(map_lanes, lanes=lanes, name="encoding")

    def run(group: Group) -> Made:
        clock = [time.perf_counter()]
        chunks = chunk_documents(make_documents(group.texts), tokenizer, cutting)
        clock.append(time.perf_counter())
        groups = batch_rows(chunks.num_tokens, max_batch_tokens=budget, lanes=lanes)
        batches = [pack_rows(chunks, rows) for rows in groups]
        clock.append(time.perf_counter())
        parts = [part for part in encoder.encode_all(batches) if not isinstance(part, FailedRow)]
        clock.append(time.perf_counter())
        order_rows(parts, start=0, stop=chunks.num_rows)
        clock.append(time.perf_counter())
        spent = (after - before for before, after in pairwise(clock))
        return Made(
            positions=sum(fill_up(len(batch.input_ids), device=model.device) for batch in batches),
            stages=dict(zip(("tokenising", "batching", "encoding", "ordering"), spent, strict=True)),
        )

    return run


def load_tokenizer_alone(folder: Path) -> Runner:
    """Return a run of the backend's `encode_batch_fast`, which spreads texts over the cores."""
    backend = load_tokenizer(read_checkpoint(folder)).backend

    def run(group: Group) -> Made:
        backend.encode_batch_fast(group.texts)
        return Made(positions=group.tokens)

    return run


def make_documents(texts: list[str]) -> list[Document]:
    """Dress texts as a corpus's documents."""
    return [
        Document(id="", position=place, text=text, text_hash=(0, 0), has_own_id=True)
        for place, text in enumerate(texts)
    ]

"""Finished rows to the folder: brought in order, long documents merged, ColBERT compressed, the shard committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import numpy as np

from m3cli.config import EncodeConfig
from m3cli.encoder.compression import compress_rows
from m3cli.encoder.merge import Merger, plan_rows
from m3cli.encoder.window import order_rows
from m3cli.jobs.stages import EncodedBatch, TokenisedShard
from m3cli.progress import Stopwatch
from m3cli.records import DoneEntry, Embeddings
from m3cli.store.folder import RunFolder
from m3cli.store.layout import RowForm


class _GivenUp(Exception):
    """The shard that is being written comes once more."""


def write_shard(
    folder: RunFolder,
    shard: TokenisedShard,
    batches: Iterator[EncodedBatch],
    *,
    form: RowForm,
    config: EncodeConfig,
    source: str,
    watch: Stopwatch,
) -> DoneEntry | None:
    """Write a shard's windows as they come, and commit it; None if it was given up on the way."""
    rows = plan_rows(shard.chunks, long_docs=config.long_docs, taken=shard.origins.rows)
    with (
        folder.open_shard(form=form, text=shard.text, chunks=rows, source=source) as writer,
        suppress(_GivenUp),
    ):
        for window in finish_windows(shard, _go_on(batches), config=config):
            with watch.count("writing"):
                writer.append(window)
        with watch.count("writing"):
            entry = writer.finish()
            folder.commit(entry)
        return entry
    return None


def finish_windows(
    shard: TokenisedShard, batches: Iterator[EncodedBatch], *, config: EncodeConfig
) -> Iterator[Embeddings]:
    """Yield the rows to be written, ascending, a window at a time."""
    merger = None
    if config.merges:
        merger = Merger(
            shard.chunks,
            taken=shard.origins.rows,
            long_docs=config.long_docs,
            dense_dtype=config.dense_dtype,
            colbert_form=config.colbert_form,
        )
    first = 0
    for (start, stop), window in groupby(batches, key=lambda batch: (batch.start, batch.stop)):
        parts = (batch.embeddings for batch in window if batch.embeddings is not None)
        if start == stop:
            continue
        if merger is None:
            yield order_rows((compress_rows(part, config.colbert_form) for part in parts), start=start, stop=stop)
            continue
        merged = [compress_rows(part, config.colbert_form) for part in merge_window(parts, merger, shard)]
        last = first + sum(len(part.rows) for part in merged)
        if first < last:
            yield order_rows(merged, start=first, stop=last)
        first = last


def merge_window(parts: Iterable[Embeddings], merger: Merger, shard: TokenisedShard) -> Iterator[Embeddings]:
    """Yield the rows to be written that a window completes; what an older folder had is as it is to be written."""
    fresh = []
    for part in parts:
        if np.isin(part.rows[:1], shard.origins.rows).all():
            yield merger.place(part)
        else:
            fresh.append(part)
    if fresh:
        rows = np.sort(np.concatenate([part.rows for part in fresh]))
        renumbered = (replace(part, rows=np.searchsorted(rows, part.rows)) for part in fresh)
        yield from merger.feed(replace(order_rows(renumbered, start=0, stop=len(rows)), rows=rows))


def _go_on(batches: Iterator[EncodedBatch]) -> Iterator[EncodedBatch]:
    for batch in batches:
        if batch.given_up:
            raise _GivenUp
        yield batch

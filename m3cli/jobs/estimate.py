"""What a corpus will come to, from a small sample of it: documents, tokens, bytes on disk.

A few shards of 64 KiB spread over the input are read and tokenised; line formats are scaled by bytes, Parquet by rows,
whose number its footer tells. Input that can only be streamed is not sampled: then nothing is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m3cli.corpus.plan import plan_shards
from m3cli.corpus.reader import Action, read_shards
from m3cli.encoder.chunker import chunk_documents
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.jobs.run import Run
from m3cli.records import Shard
from m3cli.store.layout import RowForm, estimate_bytes

SAMPLE_SHARD_BYTES = 64 << 10
SAMPLE_SHARDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a corpus will come to."""

    documents: int
    rows: int
    tokens: int
    bytes_on_disk: dict[str, int]
    "per output"


@dataclass(slots=True)
class _Sample:
    weight: int = 0
    "bytes or rows of the input that were read"
    documents: int = 0
    rows: int = 0
    tokens: int = 0
    text_bytes: int = 0


def estimate_corpus(run: Run, form: RowForm, tokenizer: Tokenizer) -> Estimate | None:
    """Estimate the whole corpus; None where some of it can only be streamed."""
    meaning = run.meaning
    plan = plan_shards(
        run.sources,
        fields=meaning.fields,
        shard_size=SAMPLE_SHARD_BYTES,
        limit=meaning.limit,
        max_row_bytes=meaning.max_row_bytes,
    )
    if not plan.complete or not plan.shards:
        return None
    chosen = set(_spread(plan.shards))

    def ask(shard: Shard) -> Action:
        return "read" if shard.index in chosen else "skip"

    samples = {True: _Sample(), False: _Sample()}
    texts = read_shards(
        run.sources,
        plan=plan,
        fields=meaning.fields,
        schema=form.kept,
        title_sep=meaning.title_sep,
        max_row_bytes=meaning.max_row_bytes,
        ask=ask,
    )
    for text in texts:
        chunks = chunk_documents(
            text.documents,
            tokenizer,
            max_length=meaning.max_length,
            overlap=meaning.overlap,
            long_docs=meaning.long_docs,
            prefix=meaning.prefix,
        )
        sample = samples[_counts_rows(text.shard)]
        sample.weight += text.shard.stop - text.shard.start
        sample.documents += len(text.documents)
        sample.rows += chunks.num_rows
        sample.tokens += len(chunks.input_ids)
        sample.text_bytes += sum(len(document.text.encode()) for document in text.documents)
    totals = _scale(plan.shards, samples)
    sizes = estimate_bytes(form, rows=totals.rows, tokens=totals.tokens, text_bytes=totals.text_bytes)
    return Estimate(documents=totals.documents, rows=totals.rows, tokens=totals.tokens, bytes_on_disk=sizes)


def _counts_rows(shard: Shard) -> bool:
    """Whether a shard's start and stop count rows (Parquet), not bytes."""
    return shard.row_group >= 0


def _spread(shards: Sequence[Shard]) -> list[int]:
    """Choose shards from the beginning to the end, of each kind there is."""
    chosen = []
    for rows in (True, False):
        kind = [shard.index for shard in shards if _counts_rows(shard) == rows]
        step = max(1, len(kind) // SAMPLE_SHARDS)
        chosen += kind[::step][:SAMPLE_SHARDS]
    return chosen


def _scale(shards: Sequence[Shard], samples: dict[bool, _Sample]) -> _Sample:
    totals = _Sample()
    for rows, sample in samples.items():
        weight = sum(shard.stop - shard.start for shard in shards if _counts_rows(shard) == rows)
        factor = weight / sample.weight if sample.weight else 0.0
        totals.documents += round(sample.documents * factor)
        totals.rows += round(sample.rows * factor)
        totals.tokens += round(sample.tokens * factor)
        totals.text_bytes += round(sample.text_bytes * factor)
    return totals

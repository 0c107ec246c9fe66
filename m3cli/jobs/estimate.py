"""What a corpus will come to, from a small sample of it: documents, tokens, bytes on disk.

A few shards of 64 KiB spread over the input are read and tokenised; line formats are scaled by bytes, Parquet by rows,
whose number its footer tells. Of compressed files the beginnings are read, and scaled by what the first MiBs of each
come to when they are decompressed. Of standard input nothing is read: then nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from m3cli.config import ColbertForm
from m3cli.corpus.plan import Plan, plan_shards
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.streams import measure_ratio
from m3cli.encoder.chunker import chunk_documents, cutting_of
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.errors import CorpusError
from m3cli.jobs.run import Run
from m3cli.records import Shard, ShardText, Source
from m3cli.store.layout import RowForm, estimate_bytes

SAMPLE_SHARD_BYTES = 64 << 10
SAMPLE_SHARDS = 6
RATIO_BYTES = 4 << 20
"of a compressed file, to see what they come to"
CHOICES = {
    "float16": ColbertForm(),
    "--colbert-dtype int8": ColbertForm(dtype="int8"),
    "--colbert-dtype binary": ColbertForm(dtype="binary"),
    "--colbert-pool 2": ColbertForm(pool=2),
    "--colbert-pool 2 --colbert-dtype int8": ColbertForm(pool=2, dtype="int8"),
    "--colbert-pool 4 --colbert-dtype int8": ColbertForm(pool=4, dtype="int8"),
    "--colbert-pool 2 --colbert-dtype binary": ColbertForm(pool=2, dtype="binary"),
}
"ways to store ColBERT vectors whose price is shown"


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

    def add(self, sample: _Sample, *, factor: float) -> _Sample:
        """Add what a sample stands for."""
        self.documents += round(sample.documents * factor)
        self.rows += round(sample.rows * factor)
        self.tokens += round(sample.tokens * factor)
        self.text_bytes += round(sample.text_bytes * factor)
        return self


def estimate_corpus(run: Run, form: RowForm, tokenizer: Tokenizer) -> Estimate | None:
    """Estimate the whole corpus; None where some of it comes by standard input, or there is nothing."""
    if any(source.path == "-" for source in run.sources):
        return None
    sampler = _Sampler(run, form, tokenizer)
    totals = _Sample()
    plain = tuple(source for source in run.sources if not source.sequential)
    if plain:
        sampler.add_plain(plain, totals)
    try:
        sampler.add_streams([source for source in run.sources if source.sequential], totals)
    except CorpusError:
        return None  # what comes before the fault is encoded, and the fault named where it is met
    limit = run.meaning.limit
    if limit is not None and totals.documents > limit:
        totals = _Sample().add(totals, factor=limit / totals.documents)
    if not totals.documents:
        return None
    sizes = estimate_bytes(form, rows=totals.rows, tokens=totals.tokens, text_bytes=totals.text_bytes)
    return Estimate(documents=totals.documents, rows=totals.rows, tokens=totals.tokens, bytes_on_disk=sizes)


def estimate_choices(form: RowForm, estimate: Estimate) -> dict[str, int]:
    """Return the bytes of the ColBERT vectors, by the flags that say how they are stored."""
    return {
        flags: estimate_bytes(replace(form, colbert=colbert), rows=estimate.rows, tokens=estimate.tokens)["colbert"]
        for flags, colbert in CHOICES.items()
    }


class _Sampler:
    """What the samples of one run are read and cut with."""

    def __init__(self, run: Run, form: RowForm, tokenizer: Tokenizer) -> None:
        self._meaning = run.meaning
        self._form = form
        self._tokenizer = tokenizer

    def add_plain(self, sources: tuple[Source, ...], totals: _Sample) -> None:
        """Add files of which any part can be read."""
        plan = self._plan(sources)
        chosen = set(_spread(plan.shards))
        samples = {True: _Sample(), False: _Sample()}
        for text in self._read(sources, plan, lambda shard: "read" if shard.index in chosen else "skip"):
            self._count(text, samples[_counts_rows(text.shard)])
        for rows, sample in samples.items():
            weight = sum(shard.stop - shard.start for shard in plan.shards if _counts_rows(shard) == rows)
            totals.add(sample, factor=weight / sample.weight if sample.weight else 0.0)

    def add_streams(self, sources: Sequence[Source], totals: _Sample) -> None:
        """Add compressed files, of which some are begun to be read."""
        sample, size = _Sample(), 0.0
        begun = sources[:: max(1, len(sources) // SAMPLE_SHARDS)][:SAMPLE_SHARDS]
        for source in begun:
            length = source.size * measure_ratio(source, size=RATIO_BYTES)
            size += length
            texts = self._read((source,), self._plan((source,)), lambda _: "read")
            for _, text in zip(range(SAMPLE_SHARDS), texts, strict=False):
                self._count(text, sample)
                sample.weight -= max(0, text.shard.stop - round(length))  # the last shard ends where it was meant to
            texts.close()
        whole = size * sum(source.size for source in sources) / max(1, sum(source.size for source in begun))
        totals.add(sample, factor=whole / sample.weight if sample.weight else 0.0)

    def _plan(self, sources: tuple[Source, ...]) -> Plan:
        meaning = self._meaning
        return plan_shards(
            sources,
            fields=meaning.fields,
            shard_size=SAMPLE_SHARD_BYTES,
            limit=meaning.limit,
            max_row_bytes=meaning.max_row_bytes,
        )

    def _read(
        self, sources: tuple[Source, ...], plan: Plan, ask: Callable[[Shard], Action]
    ) -> Generator[ShardText, None, int]:
        return read_shards(
            sources,
            plan=plan,
            fields=self._meaning.fields,
            schema=self._form.kept,
            title_sep=self._meaning.title_sep,
            max_row_bytes=self._meaning.max_row_bytes,
            ask=ask,
        )

    def _count(self, text: ShardText, sample: _Sample) -> None:
        chunks = chunk_documents(text.documents, self._tokenizer, cutting_of(self._meaning))
        sample.weight += text.shard.stop - text.shard.start
        sample.documents += len(text.documents)
        sample.rows += chunks.num_rows
        sample.tokens += len(chunks.input_ids)
        sample.text_bytes += sum(len(document.text.encode()) for document in text.documents)


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

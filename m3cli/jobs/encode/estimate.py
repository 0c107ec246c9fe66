"""Estimate documents, rows, tokens and bytes on disk from a small sample of the corpus; check the disk space.

A few samples of 64 KiB at even distances are read and tokenised, each extended to complete rows. Line formats are
scaled by bytes, Parquet by rows (its footer has their number). Of compressed files the beginning is read, and scaled by
how much its first MiBs expand. Standard input gives no estimate. Only the beginning of a long document is tokenised.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ColbertForm, RunConfig
from m3cli.corpus.plan import Plan, plan_shards, sample_shards
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.streams import measure_ratio
from m3cli.encoder.chunker import chunk_documents, cutting_of
from m3cli.encoder.embeddings import DOCUMENT_ROW, bound_vectors, join_chunks, plan_rows
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.errors import CorpusError, OutputError
from m3cli.records import Chunks, DoneEntry, Shard, ShardText, Source
from m3cli.store.layout import WEIGHTS_PER_TOKEN, RowForm, estimate_bytes

SAMPLE_SHARD_BYTES = 64 << 10
SAMPLE_SHARDS = 6
SAMPLE_CHARS = 64 << 10
"tokenised of a document"
RATIO_BYTES = 4 << 20
"of a compressed file, to measure how much they expand"
CHOICES = {
    "float16": ColbertForm(),
    "--colbert-dtype int8": ColbertForm(dtype="int8"),
    "--colbert-dtype binary": ColbertForm(dtype="binary"),
    "--colbert-pool 2": ColbertForm(pool=2),
    "--colbert-pool 2 --colbert-dtype int8": ColbertForm(pool=2, dtype="int8"),
    "--colbert-pool 4 --colbert-dtype int8": ColbertForm(pool=4, dtype="int8"),
    "--colbert-pool 2 --colbert-dtype binary": ColbertForm(pool=2, dtype="binary"),
}
"forms of ColBERT vectors whose size is shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The estimated size of an encoded corpus."""

    documents: int
    tokens: int
    bytes_on_disk: dict[str, int]
    "per output"
    colbert_choices: dict[str, int] | None
    "bytes of the ColBERT vectors by the options that choose their form; None: there are no vectors"
    sample: Chunks
    "rows of the corpus, from several places"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Documents of the sample, and the S rows that are written for them."""

    factor: float
    "documents of the corpus per document of the sample"
    documents: int
    num_tokens: NDArray[np.float64]
    "[S]"
    weights: NDArray[np.float64]
    "[S] rows of the document per row of the sample"
    own: NDArray[np.bool_]
    "[S] whether it is a document's own row next to its chunks, without ColBERT matrix and tokens of its own"
    text_bytes: float
    "of the rows' texts"
    kept_bytes: float
    "of the rows' kept fields"
    chunks: Chunks
    "what goes through the model for these documents"


def estimate_corpus(run: RunConfig, form: RowForm, tokenizer: Tokenizer) -> Estimate | None:
    """Estimate the corpus; None: some of it is standard input, or it is empty."""
    if any(source.path == "-" for source in run.sources):
        return None
    sampler = _Sampler(run, form, tokenizer)
    try:
        samples = [
            *sampler.read_plain(tuple(source for source in run.sources if not source.sequential)),
            *sampler.read_streams([source for source in run.sources if source.sequential]),
        ]
    except CorpusError:
        return None  # the rows before the error are encoded, and the run reports the error
    documents = sum(sample.documents * sample.factor for sample in samples)
    if not documents:
        return None
    limit = run.config.limit
    if limit is not None and documents > limit:
        samples = [replace(sample, factor=sample.factor * limit / documents) for sample in samples]
    sizes = _estimate_sizes(form, samples)
    choices = None
    if "colbert" in form.outputs:
        choices = {
            flags: _estimate_sizes(replace(form, colbert=colbert), samples)["colbert"]
            for flags, colbert in CHOICES.items()
        }
    return Estimate(
        documents=round(sum(sample.documents * sample.factor for sample in samples)),
        tokens=round(
            sum(float(sample.num_tokens @ (sample.weights * ~sample.own)) * sample.factor for sample in samples)
        ),
        bytes_on_disk=sizes,
        colbert_choices=choices,
        sample=reduce(join_chunks, (sample.chunks for sample in samples)),
    )


def _estimate_sizes(form: RowForm, samples: Sequence[_Sample]) -> dict[str, int]:
    counts = dict.fromkeys(("documents", "rows", "weights", "vectors", "text_bytes", "kept_bytes"), 0.0)
    for sample in samples:
        lexical = np.minimum(sample.num_tokens * WEIGHTS_PER_TOKEN, form.vocabulary)
        vectors = bound_vectors(np.maximum(sample.num_tokens - 1, 0), form.colbert) * ~sample.own
        found = {
            "documents": sample.documents,
            "rows": sample.weights.sum(),
            "weights": lexical @ sample.weights,
            "vectors": vectors @ sample.weights,
            "text_bytes": sample.text_bytes,
            "kept_bytes": sample.kept_bytes,
        }
        for name, count in found.items():
            counts[name] += float(count) * sample.factor
    return estimate_bytes(form, **{name: round(count) for name, count in counts.items()})


class _Sampler:
    """What the samples of one run are read and cut with."""

    def __init__(self, run: RunConfig, form: RowForm, tokenizer: Tokenizer) -> None:
        self._config = run.config
        self._form = form
        self._tokenizer = tokenizer

    def read_plain(self, sources: tuple[Source, ...]) -> list[_Sample]:
        """Read samples of files in which any part can be read."""
        plan = self._plan(sources)
        samples = sample_shards(sources, plan, number=SAMPLE_SHARDS, max_row_bytes=self._config.max_row_bytes)
        plan = replace(plan, shards=tuple(sample.shard for sample in samples), rows_left=None)
        # A limit may end before the last source: the reader would go on with those that the plan leaves out.
        texts = self._read(sources[: plan.num_sources], plan, lambda _: "read")
        return [self._measure([text], sample.factor) for text, sample in zip(texts, samples, strict=True)]

    def read_streams(self, sources: Sequence[Source]) -> list[_Sample]:
        """Read the beginnings of some compressed files."""
        begun = sources[:: max(1, len(sources) // SAMPLE_SHARDS)][:SAMPLE_SHARDS]
        whole = sum(source.size for source in sources) / max(1, sum(source.size for source in begun))
        return [self._read_beginning(source, whole) for source in begun]

    def _read_beginning(self, source: Source, factor: float) -> _Sample:
        """Read what begins in the first shards of a file, up to the row after it, or its end."""
        texts: list[ShardText] = []
        shards = self._read((source,), self._plan((source,)), lambda _: "read")
        for text in shards:
            positions = [document.position for document in text.documents]
            positions += [skipped.position for skipped in text.skipped]
            if text.shard.index >= SAMPLE_SHARDS and positions:
                length = source.size * measure_ratio(source, size=RATIO_BYTES)
                factor *= max(1.0, length / min(positions))
                break
            texts.append(text)
        shards.close()
        return self._measure(texts, factor)

    def _plan(self, sources: tuple[Source, ...]) -> Plan:
        config = self._config
        return plan_shards(
            sources,
            fields=config.fields,
            shard_size=SAMPLE_SHARD_BYTES,
            limit=config.limit,
            max_row_bytes=config.max_row_bytes,
        )

    def _read(
        self, sources: tuple[Source, ...], plan: Plan, ask: Callable[[Shard], Action]
    ) -> Generator[ShardText, None, int]:
        return read_shards(
            sources,
            plan=plan,
            fields=self._config.fields,
            schema=self._form.kept,
            title_sep=self._config.title_sep,
            max_row_bytes=self._config.max_row_bytes,
            ask=ask,
        )

    def _measure(self, texts: Sequence[ShardText], factor: float) -> _Sample:
        """Cut documents into the rows that are written for them; what is cut off a long one counts by its length."""
        documents = [document for text in texts for document in text.documents]
        begun = [replace(document, text=document.text[:SAMPLE_CHARS]) for document in documents]
        truncated = self._config.long_docs == "truncate"
        stretch = np.array(
            [
                1.0 if truncated else len(whole.text) / len(part.text)
                for whole, part in zip(documents, begun, strict=True)
            ]
        )
        none = np.empty(0, np.int64)
        chunks = chunk_documents(begun, self._tokenizer, cutting_of(self._config))
        rows = plan_rows(chunks, long_docs=self._config.long_docs, taken=none)
        own = rows.chunk_index == DOCUMENT_ROW
        longer = stretch[rows.document] if rows.num_rows else np.empty(0)
        is_whole = own if self._config.long_docs == "both" else np.full(rows.num_rows, self._config.merges)
        weights = np.where(is_whole, 1.0, longer)
        bytes_a_char = np.array([len(part.text.encode()) / len(part.text) for part in begun])
        chars = (rows.char_end - rows.char_start) * longer
        kept = sum(text.kept.nbytes for text in texts if text.kept is not None)
        return _Sample(
            factor=factor,
            documents=len(documents),
            num_tokens=np.where(is_whole, rows.num_tokens * longer, rows.num_tokens),
            weights=weights,
            own=own,
            text_bytes=float(chars @ bytes_a_char[rows.document]) if rows.num_rows else 0.0,
            kept_bytes=kept * float(weights.sum()) / max(1, len(documents)),
            chunks=chunks,
        )


def find_free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be on."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def count_needed(sizes: Mapping[str, int], *, num_shards: int | None, done: Mapping[int, DoneEntry]) -> int:
    """Return the bytes of the folder that are still to be written."""
    total = sum(sizes.values())
    if num_shards:
        return total * max(0, num_shards - len(done)) // num_shards
    return max(0, total - sum(file.length for entry in done.values() for file in entry.files))


def check_disk_space(
    folder: Path,
    sizes: Mapping[str, int],
    *,
    num_shards: int | None,
    done: Mapping[int, DoneEntry],
    choices: Mapping[str, int] | None = None,
) -> None:
    """Raise OutputError if the disk is too small for the remaining shards.

    Args:
        folder: that is written to.
        sizes: bytes of each output of the complete folder.
        num_shards: of the complete folder; None: unknown.
        done: the shards that are done.
        choices: bytes of the ColBERT vectors by the options that choose their form; None: the form is fixed.
    """
    need, free = count_needed(sizes, num_shards=num_shards, done=done), find_free_bytes(folder)
    if need <= free:
        return
    from m3cli.tables import format_bytes  # noqa: PLC0415  rich, only for this

    rest = need - sizes.get("colbert", 0)
    smaller = next((flags for flags, size in (choices or {}).items() if rest + size <= free), None)
    raise OutputError(
        f"{folder} needs about {format_bytes(need)} more and its disk has {format_bytes(free)} free; "
        f"free some space, choose another --out, {f'try {smaller}, ' if smaller else ''}"
        "or start anyway with --no-space-check"
    )

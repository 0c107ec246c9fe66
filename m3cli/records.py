"""Frozen records that packages exchange: numpy arrays, with shape and dtype below each field.

The data goes from source to shard, document, chunks, batch, embeddings and done entry. Records are plain data without
torch and pyarrow. Arrays are shared, not copied: a receiver never writes into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

Output = Literal["dense", "sparse", "colbert"]
SourceFormat = Literal["jsonl", "csv", "tsv", "text", "parquet", "arrow", "files"]
COLUMNAR: tuple[SourceFormat, ...] = ("parquet", "arrow")
Compression = Literal["none", "gzip", "zstd"]


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number in a JSON file, both included, which the reader checks."""

    least: int
    most: int = 1 << 62


Count = Annotated[int, Between(0)]
Positive = Annotated[int, Between(1)]

Rankings = Mapping[str, Mapping[str, float]]
"scores by query id and document id"
Judgements = Mapping[str, Mapping[str, int]]
"relevance by query id and document id, 0 or less for not relevant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input file, or standard input."""

    name: str
    "path relative to the inputs' common folder with '/', the file name of a single input, 'stdin' for standard input"
    path: str
    "absolute path, or the address of an object in a bucket; '-' for standard input"
    format: SourceFormat
    compression: Compression
    size: Annotated[int, Between(-1)]
    "bytes on disk (compressed); -1 for standard input"
    mtime_ns: int
    """of an object in a bucket 60 bits of the hash of its ETag instead, of a folder those of its files' paths, sizes
    and dates; -1 for standard input"""

    @property
    def in_bytes(self) -> bool:
        """Whether the position of a row is a byte offset, rather than a number."""
        return self.format not in {*COLUMNAR, "files"}

    @property
    def sequential(self) -> bool:
        """Whether a row can only be reached by reading everything before it."""
        return self.compression != "none" or self.path == "-" or self.format == "csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Names of the fields, resolved once for a folder."""

    text: str
    id: str | None
    "None: rows have no id, each gets `source-name:position`"
    title: str | None
    kept: tuple[str, ...]
    columns: tuple[str, ...]
    "names of the TSV columns, from the header or '1', '2', ...; empty without TSV sources"
    header: bool
    "whether the first line of each TSV source is a header"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A range of input rows of one source, fixed before any work on it."""

    index: Count
    "number in the folder, from 0"
    source: Count
    "index into the run's sources"
    start: Count
    "line formats: a row is the shard's if its first byte (decompressed) is in [start, stop); of others: row numbers"
    stop: Count
    row_group: Annotated[int, Between(-1)] = -1
    "Parquet: the row group that `start` and `stop` count in; Arrow, files: 0; line formats: -1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One row of the corpus that can be encoded."""

    id: str
    text: str
    "title + title separator + text, as encoded and as offsets count it; never empty, no lone surrogates"
    text_hash: tuple[int, int]
    "xxh3_128 of the UTF-8 text as (high, low) 64-bit halves"
    has_own_id: bool
    "False: the row has no id, `id` is `source-name:position`"
    position: int
    "byte offset in the decompressed stream for line formats, row number for others"


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRow:
    """One row of the corpus that is not encoded, with the reason."""

    source: str
    position: int
    "byte offset in the decompressed stream for line formats, row number for others"
    byte_offset: int | None
    "the position if it is a byte offset; None: it is a row number"
    id: str | None
    reason: str
    "a short fixed phrase, the same for all rows with this error: 'invalid JSON', 'empty text', ..."
    detail: str
    "details of this row; may be empty"
    row: bytes
    "first 64 KiB of the row, or of the text if the model failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardText:
    """The documents of a shard."""

    shard: Shard
    documents: tuple[Document, ...]
    "in corpus order; empty if the shard was only hashed"
    kept: Any
    "pyarrow.Table of the kept fields, one row a document, the same schema in every shard; None without kept fields"
    skipped: tuple[SkippedRow, ...]
    input_hash: str
    "xxh3_128 (hex) of the shard's input: raw bytes for line formats, values of columns, paths and bytes of files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Tokens of a shard's rows, one row a chunk, in corpus order. R rows, N tokens."""

    input_ids: NDArray[np.int32]
    "[N], each row with its <s> and </s>"
    cu_seqlens: NDArray[np.int64]
    "[R + 1] offsets of rows in input_ids"
    document: NDArray[np.int64]
    "[R], index into the shard's documents, ascending"
    chunk_index: NDArray[np.int32]
    "[R]"
    num_chunks: NDArray[np.int32]
    "[R]"
    char_start: NDArray[np.int64]
    "[R], Unicode code points of the document's text"
    char_end: NDArray[np.int64]
    "[R]"
    truncated: NDArray[np.bool_]
    "[R], whether the document's text after char_end is not encoded"
    num_repeated: NDArray[np.int32]
    "[R], tokens after <s> that the document's previous row has too: the overlap and the prefix"

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.document)

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[R] tokens of each row, <s> and </s> included."""
        return np.diff(self.cu_seqlens)


def concat_ranges(begins: NDArray[Any] | int, lengths: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranges [begin, begin + length) one after the other: their indptr [R + 1], and their items."""
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    return indptr, np.arange(indptr[-1]) + np.repeat(begins - indptr[:-1], lengths)


def is_among(values: NDArray[Any], ascending: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for [N] values whether each is among sorted ones, which np.isin would sort again at each call."""
    places = np.searchsorted(ascending, values)
    found = places < len(ascending)
    found[found] = ascending[places[found]] == values[found]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that go through the model together, one after the other without padding. B rows, N tokens."""

    rows: NDArray[np.int64]
    "[B], indices of rows in the shard, longest row first"
    input_ids: NDArray[np.int64]
    "[N]"
    cu_seqlens: NDArray[np.int32]
    "[B + 1]"
    max_seqlen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LexicalWeights:
    """Sparse rows as CSR. R rows, Z weights."""

    indptr: NDArray[np.int64]
    "[R + 1]"
    indices: NDArray[np.uint32]
    "[Z] token ids, distinct and ascending within a row"
    values: NDArray[np.float32]
    "[Z] weights > 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMatrices:
    """ColBERT matrices of R rows, one after the other. V vectors of width D."""

    indptr: NDArray[np.int64]
    "[R + 1] offsets of rows in vectors"
    vectors: NDArray[Any]
    "[V, D] float16 or float32, each of norm 1; or as stored: [V, D] int8, or [V, D / 8] uint8 with a sign a bit"
    scales: NDArray[np.float32] | None = None
    "[V] factor that gives an int8 vector norm 1; None for other types"
    weights: NDArray[np.float32] | None = None
    "[V] lexical weight of the vector's token, 0 for `</s>`; None after vectors are chosen by it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The outputs of some rows, in the order of `rows`; outputs that are not computed are None."""

    rows: NDArray[np.int64]
    "[R], indices in the shard: in a batch's order, or ascending in a window"
    dense_vecs: NDArray[Any] | None
    "[R, D] float16 or float32, norm 1"
    lexical_weights: LexicalWeights | None
    colbert_vecs: TokenMatrices | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Rows of a shard whose vectors are reused from a previous folder; their input_ids are 0. T rows."""

    rows: NDArray[np.int64]
    "[T] indices in the shard, ascending"
    shard: NDArray[np.int64]
    "[T] shard of the previous folder"
    row: NDArray[np.int64]
    "[T] row of that shard"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryHits:
    """Hits of one query, best first. H hits."""

    query: str
    "id"
    text: str | None
    "None: the query is a vector"
    ids: tuple[str, ...]
    "[H]"
    scores: NDArray[np.float32]
    "[H]"
    parts: dict[str, NDArray[np.float32]]
    "[H] scores by output, of the document's best chunk for that output"
    chunk_index: NDArray[np.int64] | None
    "[H] of the best chunk; None: unknown, also for the two below"
    char_start: NDArray[np.int64] | None
    "[H] Unicode code points of the document's text, of the best chunk"
    char_end: NDArray[np.int64] | None
    "[H]"
    texts: tuple[str | None, ...]
    "[H] the beginning of the best chunk's text, None if it is not available"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of a done entry."""

    name: str
    "path below the folder, with '/'"
    length: Count
    "bytes"
    xxh3_128: str
    "hex"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """Counts of a shard, or the sum over a folder."""

    documents: Count = 0
    chunks: Count = 0
    tokens: Count = 0
    "with <s> and </s>, without documents' own rows, which repeat their chunks"
    skipped: Count = 0
    truncated: Count = 0
    missing_ids: Count = 0
    "documents without an id"

    def __add__(self, other: ShardCounts) -> ShardCounts:
        """Add member by member."""
        return ShardCounts(
            documents=self.documents + other.documents,
            chunks=self.chunks + other.chunks,
            tokens=self.tokens + other.tokens,
            skipped=self.skipped + other.skipped,
            truncated=self.truncated + other.truncated,
            missing_ids=self.missing_ids + other.missing_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneEntry:
    """Content of `_m3/done/shard-*.json`: a complete shard and its files."""

    shard: Shard
    source: str
    "name of the source"
    input_hash: str
    counts: ShardCounts
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of `_m3/manifest.json`, which a complete folder has."""

    num_shards: Count
    counts: ShardCounts
    length: Count
    "bytes of all shards' files"
    run: str
    "xxh3_128 of run.json"
    done: tuple[str, ...]
    "xxh3_128 of each done entry, in shard order"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is going to do, as `--dry-run` prints it."""

    out: str
    model: str
    dtype: str
    device: str
    max_length: int
    outputs: tuple[str, ...]
    format: str
    settings: dict[str, Any]
    "members of EncodeConfig that are not the default"
    fingerprint: str
    threads: int
    "of the matmuls on a CPU, for all workers"
    fields: dict[str, str | None]
    "names of the input's fields of id, title and text"
    documents: int | None
    "estimated from a sample, exact for Parquet; None for piped input"
    tokens: int | None
    input_bytes: int | None
    num_shards: int | None
    shards_done: int
    bytes_on_disk: dict[str, int] | None
    "estimated bytes of the folder by output"
    bytes_needed: int | None
    "estimated bytes that remain to be written"
    free_bytes: int
    "of the folder's disk"
    colbert_choices: dict[str, int] | None
    "estimated bytes of the ColBERT vectors by the flags of their storage; None: unknown, or no ColBERT"
    tokens_per_second: float | None
    "at which a sample of the corpus was encoded here; None: not measured"
    seconds: float | None
    "expected for the shards that are not done, with loading; None: not measured"
    resumed: bool
    unread: dict[str, int]
    "files of folders and globs that are not read, by ending"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run has done."""

    out: str
    documents: int
    in_folder: int
    "documents of this run and those before it"
    chunks: int
    tokens: int
    skipped: int
    truncated: int
    missing_ids: int
    num_files: int
    bytes_written: int
    seconds: dict[str, float]
    tokens_per_second: float
    peak_memory_bytes: int
    peak_device_bytes: int
    "of GPU memory; 0 on a CPU"
    shards_done: int
    "of the whole folder"
    num_shards: int
    "of the whole folder"
    skipped_reasons: dict[str, int]
    taken: int
    "documents whose vectors are reused from a previous folder"
    gone: int | None
    "ids that only the previous folder has; None: no previous folder, or this one is incomplete"
    repeated: dict[str, int]
    "rows that were not finite in the folder's dtype, by the dtype in which they were encoded again"
    duplicate_ids: int | None
    "documents whose id an earlier document has; None: the folder is incomplete"
    unread: dict[str, int]
    "files of folders and globs that are not read, by ending"

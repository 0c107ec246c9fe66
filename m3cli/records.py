"""What passes between the packages: frozen records, numpy inside, with shape and dtype under each field.

A record travels source -> shard -> document -> chunks -> batch -> embeddings -> entry. Everything in here is plain
data: no behaviour, no torch, no pyarrow. Arrays are shared, not copied; nobody writes into one it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

Output = Literal["dense", "sparse", "colbert"]
SourceFormat = Literal["jsonl", "tsv", "text", "parquet"]
Compression = Literal["none", "gzip", "zstd"]


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number in a document, both included; checked where the document is read."""

    least: int
    most: int = 1 << 62


Count = Annotated[int, Between(0)]
Positive = Annotated[int, Between(1)]

Rankings = Mapping[str, Mapping[str, float]]
"of each query id the document ids with their scores"
Judgements = Mapping[str, Mapping[str, int]]
"of each query id the judged document ids with their relevance, 0 or less for not relevant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input file, or standard input."""

    name: str
    "path relative to the inputs' common folder with '/', a bare file name for one input, 'stdin' for standard input"
    path: str
    "absolute path; '-' for standard input"
    format: SourceFormat
    compression: Compression
    size: Annotated[int, Between(-1)]
    "bytes on disk (compressed); -1 for standard input"
    mtime_ns: int
    "-1 for standard input"

    @property
    def sequential(self) -> bool:
        """Whether rows can only be reached by reading all that comes before them."""
        return self.compression != "none" or self.path == "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Which field of a row is what, resolved once for a folder."""

    text: str
    id: str | None
    "None: no row carries an id, each gets `source-name:position`"
    title: str | None
    kept: tuple[str, ...]
    columns: tuple[str, ...]
    "names of the TSV columns in order, from the header or '1', '2', ...; empty unless a source is TSV"
    header: bool
    "whether the first line of each TSV source is a header and no row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A run of input rows, fixed before any work is done on it; never more than one source."""

    index: Count
    "number in the folder, from 0"
    source: Count
    "index into the run's sources"
    start: Count
    "line formats: a row is the shard's if its first byte (decompressed) is in [start, stop); Parquet: row numbers"
    stop: Count
    row_group: Annotated[int, Between(-1)] = -1
    "Parquet: the row group that `start` and `stop` count in; -1 otherwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One row of the corpus that can be encoded."""

    id: str
    text: str
    "title + title separator + text, as it is encoded and as offsets count it; never empty, no lone surrogates"
    text_hash: tuple[int, int]
    "xxh3_128 of the UTF-8 text as (high, low) 64-bit halves"
    has_own_id: bool
    "False: the row carried no id and was given `source-name:position`"
    position: int
    "byte offset in the decompressed stream for line formats, row number in the file for Parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRow:
    """One row of the corpus that is not encoded, and why."""

    source: str
    position: int
    "byte offset in the decompressed stream for line formats, row number in the file for Parquet"
    byte_offset: int | None
    "the position again where it is a byte offset, None for Parquet"
    id: str | None
    reason: str
    "a short fixed phrase, the same for all rows with this fault: 'invalid JSON', 'empty text', ..."
    detail: str
    "what is particular to this row; may be empty"
    row: bytes
    "first 64 KiB of the row as it was read; of one that failed in the model, of its text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardText:
    """A shard as it was read."""

    shard: Shard
    documents: tuple[Document, ...]
    "in corpus order; empty if the shard was only hashed"
    kept: Any
    "pyarrow.Table of the kept fields, one row a document, the same schema for every shard; None if nothing is kept"
    skipped: tuple[SkippedRow, ...]
    input_hash: str
    "xxh3_128 (hex) of the shard's input: the raw bytes of its rows for line formats, its rows' values for Parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """All rows of a shard as tokens: one row a chunk, in corpus order. R rows, N tokens."""

    input_ids: NDArray[np.int32]
    "[N], each row with its <s> and </s>"
    cu_seqlens: NDArray[np.int64]
    "[R + 1], where rows begin in input_ids"
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
    "[R], tokens after <s> that the document's row before has too: the overlap, and a prefix"

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.document)

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[R] tokens of each row, <s> and </s> included."""
        return np.diff(self.cu_seqlens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that go through the model together, packed one after the other. B rows, N tokens, no padding."""

    rows: NDArray[np.int64]
    "[B], the rows' places in the shard, longest row first"
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
    "[Z] token ids, ascending within a row, none twice"
    values: NDArray[np.float32]
    "[Z] weights > 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMatrices:
    """ColBERT matrices of R rows, one after the other. V vectors of width D."""

    indptr: NDArray[np.int64]
    "[R + 1], where rows begin in vectors"
    vectors: NDArray[Any]
    "[V, D] float16 or float32, each of norm 1; or as stored: [V, D] int8, or [V, D / 8] uint8 with a sign a bit"
    scales: NDArray[np.float32] | None = None
    "[V] what an int8 vector is multiplied by to have norm 1; None for other types"
    weights: NDArray[np.float32] | None = None
    "[V] lexical weight of the token that a vector is of, 0 for `</s>`; only until vectors are chosen by it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The outputs of some rows, in the order of `rows`; an output that was not asked for is None."""

    rows: NDArray[np.int64]
    "[R], places in the shard: a batch's rows as they came, or a window's rows ascending"
    dense_vecs: NDArray[Any] | None
    "[R, D] float16 or float32, norm 1"
    lexical_weights: LexicalWeights | None
    colbert_vecs: TokenMatrices | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Rows of a shard whose vectors are taken over from an older folder; their input_ids are all 0. T rows."""

    rows: NDArray[np.int64]
    "[T] places in the shard, ascending"
    shard: NDArray[np.int64]
    "[T] shard of the older folder"
    row: NDArray[np.int64]
    "[T] row of that shard"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryHits:
    """What was found for one query, best first. H hits."""

    query: str
    "id"
    text: str | None
    "None: the query came as vectors"
    ids: tuple[str, ...]
    "[H]"
    scores: NDArray[np.float32]
    "[H]"
    parts: dict[str, NDArray[np.float32]]
    "[H] each, what a score was made of: of each output the best of the document's chunks"
    chunk_index: NDArray[np.int64] | None
    "[H] of the best chunk; None: not known, as the two below"
    char_start: NDArray[np.int64] | None
    "[H] Unicode code points of the document's text, of the best chunk"
    char_end: NDArray[np.int64] | None
    "[H]"
    texts: tuple[str | None, ...]
    "[H] the beginning of the best chunk's text, None where it was not kept or not read"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file that a done entry answers for."""

    name: str
    "path below the folder, with '/'"
    length: Count
    "bytes"
    xxh3_128: str
    "hex"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """What one shard, or by addition a whole folder, holds."""

    documents: Count = 0
    chunks: Count = 0
    tokens: Count = 0
    "with <s> and </s>; not of documents' own rows, which repeat those of their chunks"
    skipped: Count = 0
    truncated: Count = 0
    missing_ids: Count = 0
    "documents that carried no id"

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
    """What `_m3/done/shard-*.json` says: the shard is whole, and these are its files."""

    shard: Shard
    source: str
    "name of the source"
    input_hash: str
    counts: ShardCounts
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `_m3/manifest.json` says: the folder is complete, and this is what it holds."""

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
    """What is about to be done."""

    out: str
    model: str
    dtype: str
    device: str
    max_length: int
    outputs: tuple[str, ...]
    format: str
    settings: dict[str, Any]
    "that are not the default, by the members of EncodeConfig"
    fingerprint: str
    documents: int | None
    "estimated from a sample, exact for Parquet; None where only reading tells (piped input)"
    tokens: int | None
    input_bytes: int | None
    num_shards: int | None
    shards_done: int
    bytes_on_disk: dict[str, int] | None
    "estimated bytes per output of the whole folder"
    bytes_needed: int | None
    "estimated bytes that are still to be written"
    free_bytes: int
    "of the disk that the folder is on, or is to be on"
    colbert_choices: dict[str, int] | None
    "estimated bytes of the ColBERT vectors by the flags that say how they are stored; None: not known, or none"
    resumed: bool
    unread: dict[str, int]
    "files of folders and globs that are not read, by their ending"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What was done, in this run."""

    out: str
    documents: int
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
    "documents whose vectors were taken over from an older folder"
    gone: int | None
    "ids of the older folder that are not in this one; None: there is none, or this one is not complete"
    duplicate_ids: int | None
    "documents of the whole folder whose id an earlier one has; None: not known before it is complete"
    unread: dict[str, int]
    "files of folders and globs that are not read, by their ending"

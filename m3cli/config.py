"""What a user can choose, and what a folder was made with. Defaults live here only.

`EncodeConfig` is fingerprinted and fixed for a folder. `auto` values are resolved once, written into `run.json` and
kept by later runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

import orjson
import xxhash

import m3cli
from m3cli.records import Between, Count, Fields, Output, Positive, Source

DEFAULT_MODEL = "BAAI/bge-m3"
ALL_OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")
MAX_LENGTH_CEILING = 8192
"tokens; what BGE-M3 was trained for, whatever more positions a checkpoint has"
MAX_ROW_BYTES = 64 << 20

AUTO_SHARD_SIZE = {"cpu": 512 << 10, "cuda with colbert": 8 << 20, "cuda": 32 << 20}
"bytes of input text"

Format = Literal["parquet", "npy"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
VectorDtype = Literal["float16", "float32"]
ColbertDtype = Literal["float16", "int8", "binary"]
VectorCompression = Literal["none", "zstd"]
LongDocs = Literal["chunk", "merge", "both", "truncate"]
Split = Literal["tokens", "sentence"]

COLBERT_MEMBERS = ("colbert_dtype", "colbert_pool", "colbert_top_k")
"members of EncodeConfig that say how ColBERT vectors are stored"
OUTPUT_OF: dict[str, Output] = {"dense_dtype": "dense", **dict.fromkeys(COLBERT_MEMBERS, "colbert")}
"of each member of EncodeConfig that says how an output is stored, that output"
SHOWN_OPTIONS = (
    *("long_docs", "split", "overlap", "mcls", "dense_dtype", *COLBERT_MEMBERS, "compression"),
    *("title_sep", "prefix", "keep_text", "limit", "dedupe"),
)
"members of EncodeConfig that are shown where they are not the default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColbertForm:
    """What is kept of a row's ColBERT matrix, in this order: the heaviest tokens, means of like ones, fewer bits."""

    dtype: ColbertDtype = "float16"
    pool: int = 1
    "tokens to a vector; 1: each has its own"
    top_k: int | None = None
    "most tokens of a row that are kept, those of the largest lexical weights"

    @property
    def by_weight(self) -> bool:
        """Whether tokens are chosen by their lexical weights."""
        return self.top_k is not None

    @property
    def plain(self) -> bool:
        """Whether vectors are stored as the heads make them, rounded to float16."""
        return self == PLAIN_COLBERT

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of `dim` numbers, without its scale."""
        return {"float16": dim * 2, "int8": dim, "binary": dim // 8}[self.dtype]


PLAIN_COLBERT = ColbertForm()


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig:
    """What the bytes of a folder mean. A different value is a different folder."""

    fields: Fields
    outputs: tuple[Output, ...]
    "in the order dense, sparse, colbert"
    max_length: Positive
    "tokens of a chunk, <s> and </s> included"
    dtype: Dtype
    "of the forward pass"
    shard_size: Positive
    "bytes of input text"
    format: Format = "parquet"
    long_docs: LongDocs = "chunk"
    overlap: Count = 0
    "tokens; with split sentence, the least"
    split: Split = "sentence"
    "where long documents are cut"
    mcls: Count = 0
    "text tokens to a `<s>` of its own, the first one included; 0: a row has one"
    dense_dtype: VectorDtype = "float16"
    colbert_dtype: ColbertDtype = "float16"
    colbert_pool: Positive = 1
    colbert_top_k: Positive | None = None
    compression: VectorCompression = "none"
    "of the vectors in Parquet"
    title_sep: str = "\n"
    prefix: str = ""
    keep_text: bool = False
    limit: Positive | None = None
    "rows"
    max_row_bytes: Positive = MAX_ROW_BYTES
    dedupe: bool = False
    "equal texts of a window are encoded once"
    since: str | None = None
    "identity of the older folder that vectors are taken over from"

    @property
    def colbert_form(self) -> ColbertForm:
        """What is kept of ColBERT matrices."""
        return ColbertForm(
            dtype=self.colbert_dtype,
            pool=self.colbert_pool,
            top_k=self.colbert_top_k,
        )

    @property
    def merges(self) -> bool:
        """Whether the chunks of a document are made into a row of its own."""
        return self.long_docs in ("merge", "both")

    @property
    def exact_vectors(self) -> bool:
        """Whether a row has a ColBERT vector for every token but `<s>`, so that their number is known beforehand."""
        form = self.colbert_form
        return form.pool == 1 and not form.by_weight

    def to_json(self) -> dict[str, Any]:
        """Members as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """The checkpoint that a folder was made with."""

    name: str
    "for people, as the two below; not compared"
    path: str
    "absolute path of its folder"
    revision: str | None
    "that was asked for"
    dim: Positive
    vocabulary: Positive
    hashes: dict[str, str]
    "file name -> xxh3_128 of config, heads and tokenizer files; of size, first and last MiB of each weight file"
    tokenizer_hash: str
    "of the tokenizer's own serialisation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How fast a folder is made; may change from run to run."""

    max_batch_tokens: Annotated[int, Between(1, (1 << 31) - 1)]
    threads: Annotated[int, Between(1, 1 << 12)]
    "of the matmuls on a CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What is in run.json."""

    m3cli_version: str = m3cli.__version__
    "that began the folder"
    config: EncodeConfig
    checkpoint: CheckpointConfig
    sources: tuple[Source, ...]
    since_path: str | None = None
    "where the older folder was found; not compared"
    runtime: Runtime

    @property
    def fingerprint(self) -> str:
        """xxh3_128 (hex) of all that the folder's bytes depend on."""
        made = self.checkpoint
        checkpoint = [made.dim, made.vocabulary, made.hashes, made.tokenizer_hash]
        sources = [[source.name, source.size, source.format, source.compression] for source in self.sources]
        parts = [self.config.to_json(), checkpoint, sources]
        return xxhash.xxh3_128_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))

    def to_json(self) -> dict[str, Any]:
        """Return the members of run.json."""
        version = {"m3cli_version": self.m3cli_version, "fingerprint": self.fingerprint}
        return {**version, **asdict(self)}


def list_non_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of an EncodeConfig's members as JSON, those that people choose and that are not what a new folder has."""
    defaults = {each.name: each.default for each in fields(EncodeConfig)}
    return {name: config[name] for name in SHOWN_OPTIONS if config[name] != defaults[name]}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest:
    """What a user typed; None is a flag that was not given. It is adopted from the folder, or else the default."""

    inputs: tuple[str, ...]
    out: str | None = None
    model: str | None = None
    revision: str | None = None
    input_format: str = "auto"
    outputs: tuple[Output, ...] | None = None
    format: Format | None = None
    id_field: str | None = None
    text_field: str | None = None
    title_field: str | None = None
    title_sep: str | None = None
    keep_fields: tuple[str, ...] | None = None
    keep_text: bool | None = None
    prefix: str | None = None
    limit: int | None = None
    max_length: int | None = None
    long_docs: LongDocs | None = None
    overlap: int | None = None
    split: Split | None = None
    mcls: int | None = None
    dtype: Dtype | None = None
    dense_dtype: VectorDtype | None = None
    colbert_dtype: ColbertDtype | None = None
    colbert_pool: int | None = None
    colbert_top_k: int | None = None
    compression: VectorCompression | None = None
    shard_size: int | None = None
    max_row_bytes: int | None = None
    device: str | None = None
    max_batch_tokens: int | None = None
    worker: int = 0
    num_workers: int = 1
    max_skipped: int | float | None = None
    "an int counts rows, a float is their part of all rows; None: no limit"
    metrics: str | None = None
    "file for Prometheus' textfile collector"
    log_file: str | None = None
    "file that lines with their time are appended to"
    dedupe: bool | None = None
    since_run: str | None = None
    "an older folder to take vectors over from"
    gone: str | None = None
    "file for the ids of that folder which are not in the new one"
    verify_input: bool = False
    "hash the input of every finished shard, whatever its mtime says"
    space_check: bool = True
    "refuse to begin where the disk has no room for the estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRequest:
    """What a user asked `m3 check`."""

    folder: str
    repair: bool = False
    sample: int = 0
    "rows to encode again"
    seed: int = 0
    "of which rows those are"
    model: str | None = None
    revision: str | None = None
    device: str | None = None


TEXT_NAMES = ("text", "contents", "content", "body", "passage", "document", "query")
ID_NAMES = ("_id", "docid", "id", "doc_id", "query_id", "qid", "pid", "docno", "doc_no", "uuid", "key")
TITLE_NAMES = ("title",)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldFlags:
    """The names of a command's flags, as they are typed; those of `m3 encode` unless others are given."""

    text: str = "--text-field"
    id: str = "--id-field"
    title: str = "--title-field"
    kept: str = "--keep-fields"
    format: str | None = "--input-format"
    "None: the command has no such flag"


ENCODE_FLAGS = FieldFlags()


Mode = Literal["dense", "sparse", "colbert", "hybrid", "bm25"]
Fusion = Literal["weighted", "rrf"]
Level = Literal["document", "chunk"]
RankingFormat = Literal["trec", "jsonl"]
Terms = Literal["m3", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What a user typed; None is a flag that was not given."""

    folder: str
    queries: str
    out: str | None = None
    format: RankingFormat | None = None
    "None: by the ending of `out`; on a terminal a table"
    mode: Mode | None = None
    top_k: int = 100
    level: Level = "document"
    weights: tuple[float, float, float] | None = None
    candidates: int | None = None
    candidates_by: tuple[Output, ...] | None = None
    "of dense and sparse; None: both, as far as the folder has them"
    fusion: Fusion | None = None
    input_format: str = "auto"
    query_field: str | None = None
    query_id_field: str | None = None
    query_prefix: str = ""
    max_query_length: int | None = None
    model: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    device: str | None = None
    max_batch_tokens: int | None = None
    tokenizer: Terms | None = None
    "of BM25; None: 'm3'"
    corpus_inputs: tuple[str, ...] = ()
    "what the folder was encoded from, for BM25"

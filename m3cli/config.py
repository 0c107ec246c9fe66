"""Two frozen configs: what the bytes *mean*, and how *fast* they are made. Defaults live here only.

`Meaning` is fingerprinted and fixed for a folder; `Pace` may change when a run is continued. A user's flags arrive as
dictionaries of what was typed; `auto` values are resolved once, written into `run.json` and adopted by later runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from m3cli.records import Fields, Output

DEFAULT_MODEL = "BAAI/bge-m3"
ALL_OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")
MAX_LENGTH_CEILING = 8192
"tokens; what BGE-M3 was trained for, whatever more positions a checkpoint has"
MAX_ROW_BYTES = 64 << 20
DEFAULT_SPLIT = "sentence"

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
"members of Meaning that say how ColBERT vectors are stored"
OUTPUT_OF: dict[str, Output] = {"dense_dtype": "dense", **dict.fromkeys(COLBERT_MEMBERS, "colbert")}
"of each member of Meaning that says how an output is stored, that output"
CHOSEN = (
    *("long_docs", "split", "overlap", "mcls", "dense_dtype", *COLBERT_MEMBERS, "compression"),
    *("title_sep", "prefix", "keep_text", "limit", "dedupe"),
)
"members of Meaning that are shown where they are not the default"
ADDED_LATER = (*COLBERT_MEMBERS, "compression", "split", "mcls")
"""Members of Meaning that older folders lack; at their defaults they mean what those folders hold, and a fingerprint
leaves them out."""


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
class Meaning:
    """What the bytes of a folder mean. A different value is a different folder."""

    fields: Fields
    outputs: tuple[Output, ...]
    "in the order dense, sparse, colbert"
    max_length: int
    "tokens of a chunk, <s> and </s> included"
    dtype: Dtype
    "of the forward pass"
    shard_size: int
    "bytes of input text"
    format: Format = "parquet"
    long_docs: LongDocs = "chunk"
    overlap: int = 0
    "tokens; with split sentence, the least"
    split: Split = "tokens"
    "where long documents are cut; what older folders lack is what they did, a new one has DEFAULT_SPLIT"
    mcls: int = 0
    "text tokens to a `<s>` of its own, the first one included; 0: a row has one"
    dense_dtype: VectorDtype = "float16"
    colbert_dtype: ColbertDtype = "float16"
    colbert_pool: int = 1
    colbert_top_k: int | None = None
    compression: VectorCompression = "none"
    "of the vectors in Parquet"
    title_sep: str = "\n"
    prefix: str = ""
    keep_text: bool = False
    limit: int | None = None
    "rows"
    max_row_bytes: int = MAX_ROW_BYTES
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

    def to_identity(self) -> dict[str, Any]:
        """Members that tell folders apart: as `to_json`, without what was added later and is at its default."""
        defaults = {each.name: each.default for each in fields(self)}
        return {
            name: value for name, value in self.to_json().items() if name not in ADDED_LATER or value != defaults[name]
        }


def list_chosen(meaning: Mapping[str, Any]) -> dict[str, Any]:
    """Return, of a Meaning's members as JSON, those that people choose and that are not what a new folder has."""
    defaults = {each.name: each.default for each in fields(Meaning)}
    chosen = {name: meaning.get(name, defaults[name]) for name in CHOSEN}
    usual = {**defaults, "split": DEFAULT_SPLIT}
    if chosen["long_docs"] == "truncate":
        usual["split"] = chosen["split"]  # there is nothing that it would part
    return {name: value for name, value in chosen.items() if value != usual[name]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast the bytes are made; may change from run to run of the same folder."""

    device: str
    "'cpu', 'cuda' or 'cuda:i'"
    max_batch_tokens: int
    threads: int
    "of the matmuls on a CPU"
    worker: int = 0
    num_workers: int = 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIdentity:
    """What makes two checkpoints the same, wherever they lie."""

    name: str
    "for people; not compared"
    hashes: dict[str, str] = field(default_factory=dict)
    "file name -> xxh3_128 of config, heads and tokenizer files; of size, first and last MiB of each weight file"

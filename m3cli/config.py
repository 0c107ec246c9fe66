"""Two frozen configs: what the bytes *mean*, and how *fast* they are made. Defaults live here only.

`Meaning` is fingerprinted and fixed for a folder; `Pace` may change when a run is continued. A user's flags arrive as
dictionaries of what was typed; `auto` values are resolved once, written into `run.json` and adopted by later runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from m3cli.records import Fields, Output

DEFAULT_MODEL = "BAAI/bge-m3"
ALL_OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")
MAX_LENGTH_CEILING = 8192
"tokens; what BGE-M3 was trained for, whatever more positions a checkpoint has"
MAX_ROW_BYTES = 64 << 20

AUTO_SHARD_SIZE = {"cpu": 512 << 10, "cuda with colbert": 8 << 20, "cuda": 32 << 20}
"bytes of input text"

Format = Literal["parquet", "npy"]
Dtype = Literal["float32", "bfloat16", "float16"]
VectorDtype = Literal["float16", "float32"]
LongDocs = Literal["chunk", "truncate"]


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
    "tokens"
    dense_dtype: VectorDtype = "float16"
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

    def to_json(self) -> dict[str, Any]:
        """Members as plain JSON values."""
        return asdict(self)


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
    dtype: Dtype | None = None
    dense_dtype: VectorDtype | None = None
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

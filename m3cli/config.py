"""How options are declared, those of `m3 encode`, and the config of a folder.

A field of a request that has an `Option` is an option of the command line: `m3cli.cli.options` makes the parameters of
a command from them. `EncodeConfig` is fingerprinted and fixed for a folder. `auto` values are resolved once, written
into `run.json` and kept by later runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

import orjson
import xxhash

import m3cli
from m3cli.records import Between, Count, Fields, Output, Positive, Source

DEFAULT_MODEL = "BAAI/bge-m3"
DEFAULT_RERANKER = "BAAI/bge-reranker-v2-m3"
ALL_OUTPUTS: tuple[Output, ...] = ("dense", "sparse", "colbert")
MAX_LENGTH_CEILING = 8192
"tokens; BGE-M3 is trained for no more, even if a checkpoint has more positions"
MAX_ROW_BYTES = 64 << 20

AUTO_SHARD_SIZE = {"cpu": 512 << 10, "cuda": 8 << 20}
"bytes of input text"

Format = Literal["parquet", "npy"]
Dtype = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
VectorDtype = Literal["float16", "float32"]
ColbertDtype = Literal["float16", "int8", "binary"]
VectorCompression = Literal["none", "zstd"]
LongDocs = Literal["chunk", "merge", "both", "truncate"]
Split = Literal["tokens", "sentence"]
ProgressMode = Literal["auto", "bar", "log", "json", "none"]
Engine = Literal["local", "ray"]

TEXT_NAMES = ("text", "contents", "content", "body", "passage", "document", "query")
ID_NAMES = ("_id", "docid", "id", "doc_id", "query_id", "qid", "pid", "docno", "doc_no", "uuid", "key")
TITLE_NAMES = ("title",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColbertForm:
    """How a row's ColBERT matrix is reduced, in this order: the heaviest tokens, means of similar ones, fewer bits."""

    dtype: ColbertDtype = "float16"
    pool: int = 1
    "tokens that share a vector"
    top_k: int | None = None
    "tokens of a row that are kept, those with the largest lexical weights"

    @property
    def by_weight(self) -> bool:
        """Whether tokens are chosen by their lexical weights."""
        return self.top_k is not None

    @property
    def plain(self) -> bool:
        """Whether vectors are stored unreduced, rounded to float16."""
        return self == PLAIN_COLBERT

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of `dim` numbers, without its scale."""
        return {"float16": dim * 2, "int8": dim, "binary": dim // 8}[self.dtype]


PLAIN_COLBERT = ColbertForm()


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig:
    """Everything that the bytes of a folder depend on. A different value is a different folder."""

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
    "tokens; the least number with split sentence"
    split: Split = "sentence"
    "where long documents are cut"
    mcls: Count = 0
    "text tokens for each `<s>`; 0: a row has one `<s>`"
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
    "identity of the previous folder whose vectors are reused"

    @property
    def colbert_form(self) -> ColbertForm:
        """How ColBERT matrices are reduced."""
        return ColbertForm(
            dtype=self.colbert_dtype,
            pool=self.colbert_pool,
            top_k=self.colbert_top_k,
        )

    @property
    def merges(self) -> bool:
        """Whether the chunks of a document are merged into a row."""
        return self.long_docs in ("merge", "both")

    @property
    def exact_vectors(self) -> bool:
        """Whether each token but `<s>` has a ColBERT vector, so that their number is known before encoding."""
        form = self.colbert_form
        return form.pool == 1 and not form.by_weight

    def to_json(self) -> dict[str, Any]:
        """Members as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """The checkpoint that a folder was made with."""

    name: str
    "shown only, as are path and revision; not compared"
    path: str
    "absolute path of its folder"
    revision: str | None
    "as typed"
    dim: Positive
    vocabulary: Positive
    hashes: dict[str, str]
    "file name -> xxh3_128 of config, heads and tokenizer files; of size, first and last MiB of each weight file"
    tokenizer_hash: str
    "of the tokenizer's own serialisation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Options of speed; they may change from run to run."""

    max_batch_tokens: Annotated[int, Between(1, (1 << 31) - 1)]
    threads: Annotated[int, Between(1, 1 << 12)]
    "of the matmuls on a CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What is in run.json."""

    m3cli_version: str = m3cli.__version__
    "of the run that began the folder"
    config: EncodeConfig
    checkpoint: CheckpointConfig
    sources: tuple[Source, ...]
    since_path: str | None = None
    "path of the previous folder; not compared"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How a field of a request is typed on the command line. Everything that is not here follows from its type."""

    help: str
    panel: str
    "heading of the help it is listed under"
    default: str | None = None
    "words for a default that the field does not hold"
    metavar: str | None = None
    names: tuple[str, ...] = ()
    "as they are typed, where not --name-of-the-field"
    least: int | None = None
    read: Literal["size", "share", "row limit", "weights", "auto", "each"] | None = None
    "what the type does not tell: a form of text; auto: that word is no value; each: typed once for each value"
    common: bool = True
    "whether --help lists it; --help-all lists all"
    argument: bool = False
    needs: Output | None = None
    "the output that it is about"
    listed: bool = True
    "whether a value that is not the default is shown with a folder"


def option(help: str, panel: str, *, value: Any = None, **how: Any) -> Any:  # noqa: A002  as typer names it
    """Return a field that is an option with a default value."""
    return field(default=value, metadata={"option": Option(help=help, panel=panel, **how)})


def required(help: str, panel: str, **how: Any) -> Any:  # noqa: A002
    """Return a field that is an argument or an option without a default."""
    return option(help, panel, value=MISSING, **how)


def list_options(request: type) -> dict[str, Option]:
    """Return the options of a request by the names of its fields."""
    return {each.name: each.metadata["option"] for each in fields(request) if each.metadata}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """The checkpoint and the device of a command. None is an option that was not typed, as in all requests."""

    model: str | None = option(
        "Checkpoint folder or hub id.", "Model", default=f"$M3_MODEL or {DEFAULT_MODEL}", metavar="DIR|ID"
    )
    revision: str | None = option("Branch, tag or commit on the hub.", "Model", metavar="NAME", common=False)
    device: str | None = option("cpu, cuda or cuda:N.", "Model", default="auto", metavar="NAME", read="auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(ModelChoice):
    """The checkpoint, how it computes, and what is shown of it."""

    dtype: Dtype | None = option(
        "auto: float16 on a GPU, bfloat16 on a CPU that has it. int8 is for CPUs, nf4 for little memory.",
        "Model",
        default="auto",
        read="auto",
    )
    max_batch_tokens: int | None = option(
        "Tokens that go through the model together.", "Model", default="by device", least=1, common=False
    )
    progress: ProgressMode = option("auto: a bar on a terminal, else lines.", "Run", value="auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest(RunOptions):
    """Options of `m3 encode`. What is not typed is taken from the folder, or has the default of EncodeConfig."""

    inputs: tuple[str, ...] = required(
        "JSONL, CSV, TSV or text lines (also .gz, .zst), Parquet, Arrow, folders, globs, s3://bucket/path, or '-' "
        "for standard input.",
        "Input",
        metavar="INPUT",
        argument=True,
        read="each",
    )
    input_format: str = option(
        "auto goes by the ending.", "Input", value="auto", metavar="auto|jsonl|csv|tsv|text|parquet|arrow", common=False
    )
    per_file: bool = option(
        "INPUT is a folder of which each file (.txt, .md, .rst, .html) is a document, with its path as id.",
        "Input",
        value=False,
    )
    id_field: str | None = option(
        "Field of the id; '' for none.", "Input", default=f"first of {', '.join(ID_NAMES)}", metavar="NAME"
    )
    text_field: str | None = option(
        "Field of the text.", "Input", default=f"first of {', '.join(TEXT_NAMES)}", metavar="NAME"
    )
    title_field: str | None = option(
        "Field of the title; '' for none.", "Input", default=", ".join(TITLE_NAMES), metavar="NAME"
    )
    title_sep: str | None = option("Between title and text.", "Input", default="a line break", common=False)
    keep_fields: tuple[str, ...] | None = option("Fields to copy into the output.", "Input", metavar="A,B")
    keep_text: bool | None = option("Write the text of each chunk as column 'text'.", "Input")
    prefix: str | None = option("Words before every chunk, such as 'query: '.", "Input", common=False)
    limit: int | None = option("Only the first N rows of the input.", "Input", least=1)
    dedupe: bool | None = option("Encode equal texts of a shard once.", "Input", common=False)
    max_row_bytes: int | None = option(
        "Skip rows that are longer.", "Input", default="64M", read="size", common=False, listed=False
    )
    max_skipped: int | float | None = option(
        "End with exit code 4 if more rows are skipped.", "Input", metavar="N|P%", read="row limit", common=False
    )
    "an int counts rows, a float is the part of all rows"
    since_run: str | None = option(
        "Reuse the vectors of texts that an existing folder has, and encode the others.",
        "Input",
        metavar="OLD.m3",
        common=False,
    )
    verify_input: bool = option(
        "Hash the input of all finished shards again, even of files with an equal date.",
        "Input",
        value=False,
        common=False,
    )
    out: str | None = option(
        "Output folder.", "Output", default="the input's name with .m3", metavar="DIR", names=("--out", "-o")
    )
    outputs: tuple[Output, ...] | None = option("Some of dense,sparse,colbert.", "Output", default="all", metavar="A,B")
    format: Format | None = option("Of the folder's files.", "Output", listed=False)
    dense_dtype: VectorDtype | None = option("Of the dense vectors on disk.", "Output", needs="dense", common=False)
    colbert_dtype: ColbertDtype | None = option(
        "Of the ColBERT vectors on disk. int8 takes a half, binary (signs) a sixteenth.", "Output", needs="colbert"
    )
    colbert_pool: int | None = option(
        "Merge similar ColBERT vectors of a row until one in K remains.",
        "Output",
        least=1,
        metavar="K",
        needs="colbert",
        common=False,
    )
    colbert_top_k: int | None = option(
        "Keep the N ColBERT vectors of a row that have the largest lexical weights.",
        "Output",
        least=1,
        needs="colbert",
        common=False,
    )
    compression: VectorCompression | None = option(
        "Of the vectors in Parquet. zstd saves a tenth of float16.", "Output", common=False
    )
    gone: str | None = option(
        "Write the ids of --since-run that the new folder lacks, as JSON lines.",
        "Output",
        metavar="FILE",
        common=False,
    )
    space_check: bool = option("Begin even where the disk may be too small.", "Output", value=True, common=False)
    max_length: int | None = option("Tokens of a chunk.", "Long documents", default="8192 or less, by model", least=8)
    long_docs: LongDocs | None = option(
        "chunk: a row for each chunk. merge: a row for each document, made of its chunks. both: chunks, and a row for "
        "each document of several. truncate: the first chunk only.",
        "Long documents",
    )
    split: Split | None = option(
        "sentence: chunks of similar length that end after a paragraph, sentence or word. tokens: full chunks.",
        "Long documents",
        common=False,
    )
    overlap: int | None = option(
        "Tokens of the previous chunk that a chunk repeats.", "Long documents", least=0, common=False
    )
    mcls: int | None = option(
        "Put a <s> before every N tokens (256 in M3's paper); the dense vector is the mean of their states.",
        "Long documents",
        default="one for each row",
        least=1,
        needs="dense",
        common=False,
    )
    shard_size: int | None = option(
        "Bytes of text of a shard, such as 8M.",
        "Run",
        default="512K on a CPU, 8M or 32M on a GPU",
        read="size",
        common=False,
    )
    share: tuple[int, int] = option(
        "Encode the shards of worker I of N (I from 0).",
        "Run",
        value=(0, 1),
        names=("--worker",),
        metavar="I/N",
        read="share",
    )
    engine: Engine = option(
        "ray: worker processes of a Ray cluster, or of one that this command starts here.",
        "Run",
        value="local",
        common=False,
    )
    ray_workers: int | None = option(
        "Worker processes of --engine ray.", "Run", least=1, names=("--num-workers",), common=False
    )
    gpus_per_worker: int | None = option(
        "GPUs of a worker of --engine ray.", "Run", default="1 where there is one", least=0, common=False
    )
    cpus_per_worker: int | None = option(
        "CPUs of a worker of --engine ray, and threads of a new folder.", "Run", default="1", least=1, common=False
    )
    address: str | None = option(
        "Ray cluster of --engine ray.", "Run", default="$RAY_ADDRESS, or one of this machine", common=False
    )
    max_runtime: str | None = option(
        "Stop after a time such as 55m or 7h30m, with exit code 75 if work remains.", "Run", metavar="TIME"
    )
    metrics: str | None = option(
        "Write numbers of the run for Prometheus' textfile collector.", "Run", metavar="FILE", common=False
    )
    log_file: str | None = option(
        "Append the messages of the run, with their time.", "Run", metavar="FILE", common=False
    )

    @property
    def source_format(self) -> str:
        """The format of the input; 'auto' goes by the ending."""
        return "files" if self.per_file else self.input_format

    @property
    def input_words(self) -> list[str]:
        """The input as it is typed."""
        forced = ["--per-file"] if self.per_file else ["--input-format", self.input_format]
        return [*self.inputs, *(forced if self.source_format != "auto" else ())]

    @property
    def worker(self) -> int:
        """Number of this worker, from 0."""
        return self.share[0]

    @property
    def num_workers(self) -> int:
        """Number of workers that share the input."""
        return self.share[1]


COMPARED_OPTIONS = tuple(
    name for name in list_options(EncodeRequest) if name in {each.name for each in fields(EncodeConfig)}
)
"options of EncodeRequest that a folder keeps in its EncodeConfig"
REQUIRED_OUTPUT = {name: each.needs for name, each in list_options(EncodeRequest).items() if each.needs is not None}
"of each option that is about one output, that output"


def list_non_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in an EncodeConfig's JSON that differ from the defaults of a new folder."""
    listed = {name for name, each in list_options(EncodeRequest).items() if each.listed}
    members = [each for each in fields(EncodeConfig) if each.name in listed and each.default is not MISSING]
    return {each.name: config[each.name] for each in members if config[each.name] != each.default}


def list_field_options(found: Fields) -> dict[str, Any]:
    """Return the options for fields that differ from what is found without them."""
    return {
        "text_field": found.text if found.text not in ("", *TEXT_NAMES) else None,
        "id_field": found.id if found.id not in ID_NAMES else None,
        "title_field": found.title if found.title not in TITLE_NAMES else None,
        "keep_fields": found.kept or None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldFlags:
    """The names of a command's options for fields, for messages; by default those of `m3 encode`."""

    text: str = "--text-field"
    id: str = "--id-field"
    title: str = "--title-field"
    kept: str = "--keep-fields"
    format: str | None = "--input-format"
    "None: the command has no such option"


ENCODE_FLAGS = FieldFlags()

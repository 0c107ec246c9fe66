"""Options of the commands that read what `m3 encode` wrote, or score without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from m3cli.config import DEFAULT_RERANKER, ModelChoice, RunOptions, option, required
from m3cli.records import Output

Mode = Literal["dense", "sparse", "colbert", "hybrid", "bm25"]
Fusion = Literal["weighted", "rrf"]
Level = Literal["document", "chunk"]
RankingFormat = Literal["trec", "jsonl"]
Terms = Literal["m3", "plain"]
ScoreMode = Literal["dense", "sparse", "colbert", "sparse+dense", "colbert+sparse+dense"]
Weights = tuple[float, float, float]
"of dense, sparse, colbert"
HITS_SHOWN = 10
"of a query, in a table"


def _model_of_folder() -> Any:
    return option("Checkpoint folder or hub id.", "Model", default="$M3_MODEL or that of DIR", metavar="PATH|ID")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRequest(ModelChoice):
    """Options of `m3 check`."""

    folder: str = required("A folder that m3 encode wrote.", "Input", metavar="DIR", argument=True)
    model: str | None = _model_of_folder()
    repair: bool = option(
        "Remove the files of damaged shards, so that the next m3 encode writes them again. Other files than m3's stay.",
        "Check",
        value=False,
    )
    sample: int = option("Encode N rows again from the input and compare them.", "Check", value=0, least=0)
    seed: int = option("Which rows --sample takes.", "Check", value=0, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest(RunOptions):
    """Options of `m3 search`."""

    folder: str = required("A folder that m3 encode wrote.", "Input", metavar="DIR", argument=True)
    model: str | None = _model_of_folder()
    words: str | None = option(
        "The words of a query; without them and --queries, queries are typed on the terminal.",
        "Input",
        metavar="[QUERY]",
        argument=True,
    )
    queries: str | None = option(
        "JSONL, CSV, TSV, Parquet, Arrow or text lines of queries ('-': standard input), the words of one query, or an "
        "encoded folder whose documents are the queries.",
        "Queries",
        names=("--queries", "-q"),
        metavar="FILE|TEXT|DIR",
    )
    input_format: str = option(
        "Of the queries.", "Queries", value="auto", metavar="auto|jsonl|csv|tsv|text|parquet|arrow"
    )
    query_field: str | None = option("Field of the query's text.", "Queries", default="text, query", metavar="NAME")
    query_id_field: str | None = option(
        "Field of the query's id.", "Queries", default="_id, id, query_id", metavar="NAME"
    )
    query_prefix: str = option("Words before every query, such as 'query: '.", "Queries", value="")
    max_query_length: int | None = option("Tokens of a query.", "Queries", default="512", least=3)
    mode: Mode | None = option("What scores a row.", "Ranking", default="hybrid, or the only output there is")
    top_k: int = option("Hits of a query.", "Ranking", value=100, least=1, names=("--top-k", "-k"), metavar="K")
    weights: Weights | None = option(
        "Weights of dense,sparse,colbert in a hybrid score.",
        "Ranking",
        default="1,1,1",
        metavar="D,S,C",
        read="weights",
    )
    candidates: int | None = option(
        "Of hybrid: the best N by dense and the best N by sparse are scored by all outputs.",
        "Ranking",
        default="200, or --top-k if that is more",
        least=1,
    )
    candidates_by: tuple[Literal["dense", "sparse"], ...] | None = option(
        "Of hybrid: what finds candidates.", "Ranking", default="dense,sparse", metavar="A,B"
    )
    fusion: Fusion | None = option(
        "Of hybrid: weighted is the average of scores, rrf the sum of reciprocal ranks.", "Ranking", default="weighted"
    )
    level: Level = option(
        "document: a hit is a document, by its best chunk. chunk: a hit is a chunk, ID#NUMBER.",
        "Ranking",
        value="document",
    )
    out: str | None = option(
        ".trec, .run or .jsonl.",
        "Ranking",
        default="a TREC run on stdout, a table on a terminal",
        names=("--out", "-o"),
        metavar="FILE",
    )
    format: RankingFormat | None = option("Also of stdout.", "Ranking", default="the ending of --out")
    tokenizer: Terms | None = option(
        "m3: the tokens of the checkpoint. plain: words. The index is held in memory.", "BM25", default="m3"
    )
    corpus_inputs: tuple[str, ...] = option(
        "What the folder was encoded from, if it has no text (--keep-text). Repeat it for each input.",
        "BM25",
        value=(),
        names=("--input",),
        metavar="INPUT",
        read="each",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest(RunOptions):
    """Options of `m3 score`."""

    pairs: str = required(
        "TSV, CSV, JSONL or Parquet of query and passage, a TREC run of ids, or '-' for standard input; with PASSAGE "
        "the words of a query.",
        "Input",
        metavar="PAIRS",
        argument=True,
    )
    passage: str | None = option("The words of a passage.", "Input", metavar="[PASSAGE]", argument=True)
    input_format: str = option("Of the pairs.", "Input", value="auto", metavar="auto|tsv|csv|jsonl|parquet|trec")
    query_field: str | None = option(
        "Column of the query.", "Input", default="found by its name, else the first", metavar="NAME"
    )
    passage_field: str | None = option(
        "Column of the passage.", "Input", default="found by its name, else the second", metavar="NAME"
    )
    out: str | None = option(
        ".tsv, .jsonl or .parquet.",
        "Scores",
        default="TSV on stdout, a table on a terminal",
        names=("--out", "-o"),
        metavar="FILE",
    )
    modes: tuple[ScoreMode, ...] | None = option(
        "Some of dense,sparse,colbert,sparse+dense,colbert+sparse+dense.",
        "Scores",
        default="all that the outputs allow",
        metavar="A,B",
    )
    "in the order of the output's columns"
    weights: Weights = option(
        "Weights of dense,sparse,colbert in the averages.",
        "Scores",
        value=(1.0, 1.0, 1.0),
        default="1,1,1",
        metavar="D,S,C",
        read="weights",
    )
    max_query_length: int | None = option("Tokens of a query.", "Scores", default="512", least=3)
    max_passage_length: int | None = option("Tokens of a passage.", "Scores", default="512", least=3)
    queries: str | None = option("Encoded queries; the pairs are ids then.", "From encoded folders", metavar="DIR")
    corpus: str | None = option("Encoded passages; the pairs are ids then.", "From encoded folders", metavar="DIR")
    chunks: Literal["max", "mean", "first"] | None = option(
        "How the chunks of a document make its score.", "From encoded folders", default="max"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest(RunOptions):
    """Options of `m3 rerank`."""

    run: str = required("TREC run (also .gz, .zst), or '-' for standard input.", "Input", metavar="RUN", argument=True)
    queries: str = required(
        "Texts of the queries: what m3 encode reads, or its folder made with --keep-text.",
        "Input",
        metavar="FILE|DIR",
    )
    corpus: str = required("Texts of the documents, from the same kinds of input.", "Input", metavar="FILE|DIR")
    query_field: str | None = option("Field of the query's text.", "Input", default="text, query", metavar="NAME")
    query_id_field: str | None = option(
        "Field of the query's id.", "Input", default="_id, id, query_id", metavar="NAME"
    )
    id_field: str | None = option("Field of the document's id.", "Input", default="found by its name", metavar="NAME")
    text_field: str | None = option(
        "Field of the document's text.", "Input", default="found by its name", metavar="NAME"
    )
    title_field: str | None = option(
        "Field of the document's title; '' for none.", "Input", default="found by its name", metavar="NAME"
    )
    title_sep: str = option("Between title and text.", "Input", value="\n", default="a line break")
    model: str | None = option(
        "Cross-encoder, a folder or hub id.", "Model", default=DEFAULT_RERANKER, metavar="DIR|ID"
    )
    out: str | None = option("The new run.", "Ranking", default="stdout", names=("--out", "-o"), metavar="FILE")
    top_k: int = option("The best K documents of each query.", "Ranking", value=100, least=1, metavar="K")
    max_length: int | None = option("Tokens of a pair.", "Ranking", default="1024", least=32)
    normalise: bool = option("Scores from 0 to 1 (sigmoid), not logits.", "Ranking", value=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertRequest:
    """Options of `m3 convert`."""

    model: str = required("Checkpoint folder or hub id.", "Input", metavar="MODEL", argument=True)
    revision: str | None = option("Branch, tag or commit on the hub.", "Input", metavar="NAME")
    to: str = required("onnx.", "Output", metavar="TARGET")
    out: str = required("New folder.", "Output", names=("--out", "-o"), metavar="DIR")
    progress: Literal["auto", "none"] = option("auto: lines on stderr.", "Run", value="auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRequest:
    """Options that `m3 export` and `m3 load` share."""

    folder: str = required("A folder that m3 encode wrote.", "Input", metavar="DIR", argument=True)
    to: str = required("What is written.", "Output", metavar="TARGET")
    outputs: tuple[Output, ...] | None = option(
        "Some of dense,sparse,colbert.", "Output", default="those that the folder has and --to holds", metavar="A,B"
    )
    fields: tuple[str, ...] | None = option("Kept fields, and 'text'.", "Output", default="all", metavar="A,B")
    name: str | None = option("Of the collection, table or index.", "Output", default="that of the folder")
    progress: Literal["auto", "none"] = option("auto: a bar on a terminal, else lines.", "Run", value="auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest(TransferRequest):
    """Options of `m3 export`."""

    to: str = required(
        "parquet, npy, faiss, milvus, pgvector, lance, elasticsearch, opensearch or vespa.", "Output", metavar="TARGET"
    )
    out: str = required("Folder to write to.", "Output", names=("--out", "-o"), metavar="DIR")
    space_check: bool = option("Begin even where the disk may be too small.", "Output", value=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest(TransferRequest):
    """Options of `m3 load`."""

    to: str = required(
        "milvus:URI (a file ending in .db: Milvus Lite), pgvector:DSN or qdrant:URL.",
        "Output",
        metavar="ENGINE:ADDRESS",
    )
    since: str | None = option(
        "Write the rows that are new or changed since this folder was loaded, and delete those that it alone has.",
        "Output",
        metavar="OLD.m3",
    )
    left_out: str | None = option(
        "List of what the engine cannot hold.", "Output", default="NAME.left-out.jsonl", metavar="FILE"
    )

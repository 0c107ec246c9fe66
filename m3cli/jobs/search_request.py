"""What `m3 search` was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from m3cli.config import Dtype
from m3cli.records import Output

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

"""`m3 search`: flags to a request."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from m3cli.cli import options
from m3cli.cli.options import DTYPES, auto, check_choices, parse_names
from m3cli.cli.score import parse_weights
from m3cli.cli.terminal import open_results, open_stdin, show_run
from m3cli.errors import UsageError
from m3cli.records import Output

_QUERIES, _RANKING, _BM25 = "Queries", "Ranking", "BM25"
_CHOICES = {
    "mode": ("dense", "sparse", "colbert", "hybrid", "bm25"),
    "fusion": ("weighted", "rrf"),
    "level": ("document", "chunk"),
    "format": ("trec", "jsonl"),
    "tokenizer": ("m3", "plain"),
    "dtype": DTYPES,
}


def search(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that m3 encode wrote.", show_default=False)],
    *,
    queries: Annotated[
        str,
        typer.Option(
            "--queries",
            "-q",
            metavar="FILE|TEXT|DIR",
            help="JSONL, TSV, Parquet or text lines of queries ('-': standard input), the words of one query, or an "
            "encoded folder whose documents are the queries.",
            show_default=False,
            rich_help_panel=_QUERIES,
        ),
    ],
    input_format: Annotated[
        str, typer.Option(help="auto, jsonl, tsv, text or parquet.", rich_help_panel=_QUERIES)
    ] = "auto",
    query_field: Annotated[
        str | None,
        typer.Option(help="Field of the query's text; found by itself (text, query).", rich_help_panel=_QUERIES),
    ] = None,
    query_id_field: Annotated[
        str | None,
        typer.Option(help="Field of the query's id; found by itself (_id, id, query_id).", rich_help_panel=_QUERIES),
    ] = None,
    query_prefix: Annotated[
        str, typer.Option(help="Words before every query, such as 'query: '.", rich_help_panel=_QUERIES)
    ] = "",
    max_query_length: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a query; by default 512.", rich_help_panel=_QUERIES)
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="dense, sparse, colbert, hybrid or bm25; by default hybrid, or the only output there is.",
            rich_help_panel=_RANKING,
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, help="Hits of a query.", rich_help_panel=_RANKING)
    ] = 100,
    weights: Annotated[
        str | None,
        typer.Option(help="Of dense,sparse,colbert in a hybrid score; by default 1,1,1.", rich_help_panel=_RANKING),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of hybrid: so many by dense and so many by sparse are ranked again by all outputs; by default 200, "
            "or --top-k if that is more.",
            rich_help_panel=_RANKING,
        ),
    ] = None,
    candidates_by: Annotated[
        str | None,
        typer.Option(
            help="Of hybrid: dense, sparse, or dense,sparse (default): what finds candidates.", rich_help_panel=_RANKING
        ),
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            help="Of hybrid: weighted (average of scores, default) or rrf (reciprocal ranks).", rich_help_panel=_RANKING
        ),
    ] = None,
    level: Annotated[
        str,
        typer.Option(
            help="document: a hit is a document, by its best chunk; chunk: a hit is a chunk, ID#NUMBER.",
            rich_help_panel=_RANKING,
        ),
    ] = "document",
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help=".trec, .run or .jsonl; by default a TREC run on stdout, on a terminal a table.",
            rich_help_panel=_RANKING,
        ),
    ] = None,
    ranking_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="trec or jsonl, also on stdout; by default the ending of --out.", rich_help_panel=_RANKING
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="m3 (default: the checkpoint's tokens) or plain (words). The index is held in memory.",
            rich_help_panel=_BM25,
        ),
    ] = None,
    corpus_input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="INPUT",
            help="What the folder was encoded from, if it has no text (--keep-text); once for each input.",
            rich_help_panel=_BM25,
        ),
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.DtypeName = None,
    device: options.Device = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    progress: options.ProgressMode = "auto",
) -> None:
    """Search an encoded folder, exactly: every row is scored, in one pass; documents by their best chunk.

    Texts are encoded with the checkpoint of the folder. Rows that are no queries are counted; then the exit code is 3.
    """
    chosen = {"mode": mode, "fusion": fusion, "level": level, "format": ranking_format, "tokenizer": tokenizer}
    check_choices({**chosen, "dtype": dtype}, _CHOICES)
    chosen_weights = None if weights is None else parse_weights(weights)
    from m3cli.config import SearchRequest  # noqa: PLC0415
    from m3cli.jobs.search.command import search_corpus  # noqa: PLC0415  pyarrow, not for --help

    request = SearchRequest(
        folder=folder,
        queries=queries,
        out=None if out == "-" else out,
        format=ranking_format,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        top_k=top_k,
        level=level,  # type: ignore[arg-type]
        weights=chosen_weights,
        candidates=candidates,
        candidates_by=_parse_sources(candidates_by),
        fusion=fusion,  # type: ignore[arg-type]
        input_format=input_format,
        query_field=query_field,
        query_id_field=query_id_field,
        query_prefix=query_prefix,
        max_query_length=max_query_length,
        model=model,
        revision=revision,
        dtype=auto(dtype),  # type: ignore[arg-type]
        device=auto(device),
        max_batch_tokens=max_batch_tokens,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        corpus_inputs=tuple(corpus_input or ()),
    )
    show = _print_hits if sys.stdout.isatty() else None
    with show_run(progress) as shown:
        stdin = open_stdin([queries, *request.corpus_inputs])
        code = search_corpus(request, progress=shown, stdout=open_results(shown), stdin=stdin, show=show)
    raise typer.Exit(code)


def _parse_sources(text: str | None) -> tuple[Output, ...] | None:
    """Read 'dense,sparse' or one of them; None stays None."""
    names = parse_names(text)
    if names is None:
        return None
    if not names or not set(names) <= {"dense", "sparse"}:
        raise UsageError(f"--candidates-by {text!r}: expected dense, sparse, or dense,sparse")
    return ("dense", "sparse") if len(set(names)) == 2 else ("dense",) if "dense" in names else ("sparse",)


def _print_hits(hits: Sequence[Any]) -> None:
    from m3cli.tables import hits_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    for found in hits:
        console.print(hits_table(found))

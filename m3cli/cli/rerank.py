"""`m3 rerank`: flags to a request."""

from __future__ import annotations

from typing import Annotated

import typer

from m3cli.cli import options
from m3cli.cli.options import DTYPES, auto, check_choices
from m3cli.cli.terminal import open_results, open_stdin, show_run

_TEXTS, _RERANKING = "Texts", "Re-ranking"


def rerank(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="TREC run (also .gz, .zst), or '-' for standard input.", show_default=False),
    ],
    *,
    queries: Annotated[
        str,
        typer.Option(
            metavar="FILE|DIR",
            help="Their texts: what m3 encode reads, or its folder made with --keep-text.",
            rich_help_panel=_TEXTS,
        ),
    ],
    corpus: Annotated[
        str, typer.Option(metavar="FILE|DIR", help="Texts of the documents, the same.", rich_help_panel=_TEXTS)
    ],
    query_field: Annotated[
        str | None,
        typer.Option(help="Field of the queries' texts; found by itself (text, query).", rich_help_panel=_TEXTS),
    ] = None,
    query_id_field: Annotated[
        str | None,
        typer.Option(help="Field of the queries' ids; found by itself (_id, id, query_id).", rich_help_panel=_TEXTS),
    ] = None,
    id_field: Annotated[
        str | None, typer.Option(help="Field of the corpus' ids; found by itself.", rich_help_panel=_TEXTS)
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field of the corpus' texts; found by itself.", rich_help_panel=_TEXTS)
    ] = None,
    title_field: Annotated[
        str | None,
        typer.Option(help="Field of the corpus' titles; found by itself, '' for none.", rich_help_panel=_TEXTS),
    ] = None,
    title_sep: Annotated[
        str, typer.Option(help="Between title and text; by default a line break.", rich_help_panel=_TEXTS)
    ] = "\n",
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="The new run; by default on stdout.", rich_help_panel=_RERANKING)
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Documents of each query, the best ones.", rich_help_panel=_RERANKING)
    ] = 100,
    max_length: Annotated[
        int | None,
        typer.Option(min=32, help="Tokens of a pair; by default 1024.", rich_help_panel=_RERANKING),
    ] = None,
    normalise: Annotated[
        bool,
        typer.Option("--normalise", help="Scores from 0 to 1 (sigmoid), not logits.", rich_help_panel=_RERANKING),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Cross-encoder, a folder or hub id; by default BAAI/bge-reranker-v2-m3.", rich_help_panel="Model"
        ),
    ] = None,
    revision: options.Revision = None,
    dtype: options.DtypeName = None,
    device: options.Device = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    progress: options.ProgressMode = "auto",
) -> None:
    """Put the best documents of a run in order anew, by a cross-encoder that reads query and passage together.

    Only they are in the new run. A document whose text is not found is left out and counted; then the exit code is 3.
    """
    check_choices({"dtype": dtype}, {"dtype": DTYPES})
    from m3cli.config import FieldFlags  # noqa: PLC0415
    from m3cli.jobs.rerank import (  # noqa: PLC0415  torch, not for --help
        RerankRequest,
        TextSource,
        rerank_run,
    )

    request = RerankRequest(
        run=run,
        queries=TextSource(
            given=queries,
            flag="--queries",
            id_field=query_id_field,
            text_field=query_field,
            title_field="",
            field_flags=FieldFlags(text="--query-field", id="--query-id-field", format=None),
        ),
        corpus=TextSource(
            given=corpus,
            flag="--corpus",
            id_field=id_field,
            text_field=text_field,
            title_field=title_field,
            title_sep=title_sep,
        ),
        out=out,
        model=model,
        revision=revision,
        top_k=top_k,
        max_length=max_length,
        normalise=normalise,
        dtype=auto(dtype),
        device=auto(device),
        max_batch_tokens=max_batch_tokens,
    )
    with show_run(progress) as shown:
        code = rerank_run(request, progress=shown, stdout=open_results(shown), stdin=open_stdin([run]))
    raise typer.Exit(code)

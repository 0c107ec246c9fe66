"""`m3 score`: flags to a request."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from m3cli.cli import options
from m3cli.cli.options import DTYPES, auto, check_choices, parse_names
from m3cli.cli.terminal import open_results, open_stdin, show_run
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, UsageError

_PAIRS, _SCORES, _FOLDERS, _SPEED = "Pairs", "Scores", "From encoded folders", "Speed"
_CHUNKS = ("max", "mean", "first")
_HEAVIEST = 1_000_000
"weight; sums of scores stay far below the largest float32"


def score(
    pairs: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS",
            help="TSV, CSV, JSONL or Parquet of query and passage, a TREC run of ids, or '-' for standard input.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help=".tsv, .jsonl or .parquet; by default TSV on stdout.", rich_help_panel=_PAIRS),
    ] = None,
    input_format: Annotated[
        str, typer.Option(help="auto, tsv, csv, jsonl, parquet or trec.", rich_help_panel=_PAIRS)
    ] = "auto",
    query_field: Annotated[
        str | None, typer.Option(help="Column of the query; found by itself, else the first.", rich_help_panel=_PAIRS)
    ] = None,
    passage_field: Annotated[
        str | None,
        typer.Option(help="Column of the passage; found by itself, else the second.", rich_help_panel=_PAIRS),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Some of dense,sparse,colbert,sparse+dense,colbert+sparse+dense; by default all that can be had.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Of dense,sparse,colbert in the weighted averages.", rich_help_panel=_SCORES)
    ] = "1,1,1",
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show for each pair which tokens make its scores.", rich_help_panel=_SCORES),
    ] = False,
    max_query_length: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a query; by default 512.", rich_help_panel=_SCORES)
    ] = None,
    max_passage_length: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a passage; by default 512.", rich_help_panel=_SCORES)
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Encoded queries; the pairs are ids then.", rich_help_panel=_FOLDERS),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Encoded passages; the pairs are ids then.", rich_help_panel=_FOLDERS),
    ] = None,
    chunks: Annotated[
        str | None,
        typer.Option(help="max (default), mean or first: of a document's chunks.", rich_help_panel=_FOLDERS),
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.DtypeName = None,
    device: options.Device = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    progress: options.ProgressMode = "auto",
) -> None:
    """Score pairs of query and passage: dense, sparse, colbert and their weighted averages, in the input's order.

    A row that is no pair (an empty side, an unknown id) has empty scores; then the exit code is 3.
    """
    check_choices({"dtype": dtype, "chunks": chunks}, {"dtype": DTYPES, "chunks": _CHUNKS})
    chosen_weights, chosen_modes = parse_weights(weights), parse_modes(modes)
    from m3cli.jobs.score.command import ScoreRequest, score_pairs  # noqa: PLC0415  pyarrow, not for --help

    request = ScoreRequest(
        pairs=pairs,
        out=out,
        input_format=input_format,
        query_field=query_field,
        passage_field=passage_field,
        modes=chosen_modes,
        weights=chosen_weights,
        model=model,
        revision=revision,
        dtype=auto(dtype),
        device=auto(device),
        max_batch_tokens=max_batch_tokens,
        max_query_length=max_query_length,
        max_passage_length=max_passage_length,
        queries=queries,
        corpus=corpus,
        chunks=chunks,
    )
    with show_run(progress) as shown:
        stdin = open_stdin([pairs])
        if explain:
            from m3cli.jobs.score.explain import explain_pairs  # noqa: PLC0415  torch

            code = print_explanations(explain_pairs(request, progress=shown, stdin=stdin))
        else:
            code = score_pairs(request, progress=shown, stdout=open_results(shown), stdin=stdin)
    raise typer.Exit(code)


def parse_modes(text: str | None) -> tuple[str, ...] | None:
    """Read 'sparse,dense' into the order of the output's columns; None stays None."""
    from m3cli.retrieval.scores import MODES  # noqa: PLC0415  numpy, not for --help

    names = parse_names(text)
    if names is None:
        return None
    unknown = [name for name in names if name not in MODES]
    if unknown or not names:
        raise UsageError(f"--modes {text!r}: expected some of {', '.join(MODES)}, with commas between them")
    return tuple(mode for mode in MODES if mode in names)


def parse_weights(text: str) -> tuple[float, float, float]:
    """Read 'dense,sparse,colbert' weights."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(0 <= number <= _HEAVIEST for number in numbers):
        raise UsageError(
            f"--weights {text!r}: expected three numbers from 0 to {_HEAVIEST:,}, of dense,sparse,colbert, such as "
            "0.4,0.2,0.4"
        )
    if sum(numbers) == 0:
        raise UsageError(f"--weights {text!r}: they sum to 0, and an average is divided by their sum")
    return numbers[0], numbers[1], numbers[2]


_TABLES = (
    ("shared_tokens", "tokens that both sides have", ("token", "query_weight", "passage_weight", "product")),
    ("best_matches", "best match of each query token", ("query_token", "passage_token", "similarity")),
)


def print_explanations(explained: Iterable[dict[str, Any]]) -> int:
    """Print each pair as it comes.

    Returns:
        the exit code: 0, or 3 if some rows are no pairs.
    """
    import orjson  # noqa: PLC0415  not for --help

    faults = 0
    for pair in explained:
        faults += pair["fault"] is not None
        if sys.stdout.isatty():
            _print_tables(pair)
        else:
            sys.stdout.buffer.write(orjson.dumps(pair, option=orjson.OPT_APPEND_NEWLINE))
            sys.stdout.flush()
    return EXIT_ROWS_SKIPPED if faults else EXIT_DONE


def _print_tables(pair: dict[str, Any]) -> None:
    from m3cli.tables import draw_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    scores = "  ".join(f"{mode} {_format(value)}" for mode, value in pair["scores"].items())
    lines = [("query", pair["query"]), ("passage", pair["passage"]), ("scores", pair["fault"] or scores)]
    console.print(draw_table(f"\nrow {pair['row']}", lines))
    for member, title, columns in _TABLES:
        if member in pair:
            rows = [[_format(row[name]) for name in columns] for row in pair[member]]
            console.print(draw_table(title, rows, columns=[name.replace("_", " ") for name in columns]))


def _format(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)

"""`m3 score`: scores of pairs, or the tokens that make them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from m3cli.cli.options import takes
from m3cli.cli.terminal import open_results, open_stdin, show_run
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED
from m3cli.requests import ScoreRequest

if TYPE_CHECKING:
    from m3cli.corpus.pairs import PairColumns
    from m3cli.tables import ScoreTable

Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show for each pair which tokens make its scores.", rich_help_panel="Scores"),
]


@takes(ScoreRequest)
def score(request: ScoreRequest, *, explain: Explain = False) -> None:
    """Score pairs of query and passage: dense, sparse, colbert and their weighted averages, in the input's order.

    Two arguments are the words of one query and one passage. A row that is not a pair (an empty side, an unknown id)
    has empty scores; then the exit code is 3.
    """
    with show_run(request.progress) as shown:
        stdin = open_stdin([request.pairs] if request.passage is None else [])
        if explain:
            from m3cli.jobs.score.from_texts import explain_pairs  # noqa: PLC0415  torch

            code = print_explanations(explain_pairs(request, progress=shown, stdin=stdin))
        else:
            from m3cli.jobs.score.command import score_pairs  # noqa: PLC0415  pyarrow, not for --help

            results = open_results(shown)
            show = partial(_open_table, results) if sys.stdout.isatty() else None
            code = score_pairs(request, progress=shown, stdout=results, stdin=stdin, show=show)
    raise typer.Exit(code)


def _open_table(results: BinaryIO, columns: PairColumns, scores: Sequence[str]) -> ScoreTable:
    from m3cli.tables import ScoreTable, open_console  # noqa: PLC0415  rich is slow

    width = open_console(sys.stdout).width
    return ScoreTable(results, width=width, query=columns.query, passage=columns.passage, scores=scores)


_TABLES = (
    ("shared_tokens", "tokens that both sides have", ("token", "query_weight", "passage_weight", "product")),
    ("best_matches", "best match of each query token", ("query_token", "passage_token", "similarity")),
)


def print_explanations(explained: Iterable[dict[str, Any]]) -> int:
    """Print each pair when it is explained.

    Returns:
        the exit code: 0, or 3 if some rows are not pairs.
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

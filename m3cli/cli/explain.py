"""What `m3 score --explain` prints: tables on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED

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
    from m3cli.panel import draw_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    scores = "  ".join(f"{mode} {_spell(value)}" for mode, value in pair["scores"].items())
    lines = [("query", pair["query"]), ("passage", pair["passage"]), ("scores", pair["fault"] or scores)]
    console.print(draw_table(f"\nrow {pair['row']}", lines))
    for member, title, columns in _TABLES:
        if member in pair:
            rows = [[_spell(row[name]) for name in columns] for row in pair[member]]
            console.print(draw_table(title, rows, columns=[name.replace("_", " ") for name in columns]))


def _spell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)

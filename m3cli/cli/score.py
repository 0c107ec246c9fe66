"""`m3 score`: flags to a request."""

from __future__ import annotations

import math
import sys
from typing import Annotated

import typer

from m3cli.cli import flags
from m3cli.cli.encode import check_choices, open_stdin
from m3cli.cli.values import auto, parse_names
from m3cli.errors import UsageError

_PAIRS, _SCORES, _FOLDERS, _SPEED = "Pairs", "Scores", "From encoded folders", "Speed"
_CHUNKS = ("max", "mean", "first")


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
    model: flags.Model = None,
    revision: flags.Revision = None,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    max_batch_tokens: flags.MaxBatchTokens = None,
    progress: flags.ProgressMode = "auto",
) -> None:
    """Score pairs of query and passage: dense, sparse, colbert and their weighted averages, in the input's order.

    A row that is no pair (an empty side, an unknown id) has empty scores; then the exit code is 3.
    """
    check_choices({"dtype": auto(dtype), "progress": progress})
    check_choices({"chunks": chunks}, {"chunks": _CHUNKS})
    settled_weights, settled_modes = parse_weights(weights), parse_modes(modes)
    from m3cli.jobs.score import ScoreRequest, score_pairs  # noqa: PLC0415  pyarrow, not for --help
    from m3cli.progress import Progress  # noqa: PLC0415

    request = ScoreRequest(
        pairs=pairs,
        out=out,
        input_format=input_format,
        query_field=query_field,
        passage_field=passage_field,
        modes=settled_modes,
        weights=settled_weights,
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
    shown, stdin = Progress(progress), open_stdin([pairs])  # type: ignore[arg-type]
    if explain:
        from m3cli.cli.explain import print_explanations  # noqa: PLC0415
        from m3cli.jobs.explain import explain_pairs  # noqa: PLC0415  torch

        code = print_explanations(explain_pairs(request, progress=shown, stdin=stdin))
    else:
        code = score_pairs(request, progress=shown, stdout=sys.stdout.buffer, stdin=stdin)
    raise typer.Exit(code)


def parse_modes(text: str | None) -> tuple[str, ...] | None:
    """Read 'sparse,dense' into the order of the output's columns; None stays None."""
    from m3cli.retrieval.modes import MODES  # noqa: PLC0415  numpy, not for --help

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
    if len(numbers) != 3 or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise UsageError(
            f"--weights {text!r}: expected three numbers from 0 up, of dense,sparse,colbert, such as 0.4,0.2,0.4"
        )
    if not math.isfinite(sum(numbers)):
        raise UsageError(f"--weights {text!r}: their sum is too large to divide by; give smaller ones")
    if sum(numbers) == 0:
        raise UsageError(f"--weights {text!r}: they sum to 0, and an average is divided by their sum")
    return numbers[0], numbers[1], numbers[2]

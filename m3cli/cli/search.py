"""`m3 search`, `m3 rerank`, `m3 score` and `m3 eval`: rankings, scores of pairs, measures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from m3cli.cli.options import AsJson, parse_names, takes
from m3cli.cli.terminal import open_results, open_stdin, print_json, show_run
from m3cli.errors import EXIT_DONE, EXIT_ROWS_SKIPPED, UsageError, count_noun, escape_unprintable
from m3cli.requests import RerankRequest, ScoreRequest, SearchRequest

if TYPE_CHECKING:
    from m3cli.corpus.pairs import PairColumns
    from m3cli.jobs.eval import Agreement, Evaluation
    from m3cli.tables import ScoreTable


@takes(SearchRequest)
def search(request: SearchRequest) -> None:
    """Search an encoded folder, exactly: every row is scored, in one pass; documents by their best chunk.

    Without a query on a terminal it asks for one query after the other.

    Texts are encoded with the checkpoint of the folder. Rows that are not queries are counted; then the exit code is 3.
    """
    request = replace(request, out=None) if request.out == "-" else request
    show = _print_hits if sys.stdout.isatty() else None
    ask = _ask if show is not None and sys.stdin.isatty() else None
    with show_run(request.progress, note=f"opening {request.folder}") as shown:
        from m3cli.jobs.search.command import search_corpus  # noqa: PLC0415  pyarrow, not for --help

        stdin = open_stdin([request.queries or "", *request.corpus_inputs])
        code = search_corpus(request, progress=shown, stdout=open_results(shown), stdin=stdin, show=show, ask=ask)
    raise typer.Exit(code)


def _ask() -> str | None:
    """Return the next line that is typed; None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415  for `input`: the cursor keys, and lines that were typed before
    try:
        return input("query> ")
    except EOFError:
        print()  # noqa: T201  the shell's prompt begins a line
        return None


def _print_hits(hits: Sequence[Any]) -> None:
    from m3cli.tables import hits_table, open_console  # noqa: PLC0415  rich is slow

    console = open_console(sys.stdout)
    for found in hits:
        console.print(hits_table(found))


@takes(RerankRequest)
def rerank(request: RerankRequest) -> None:
    """Sort the best documents of a run again, by a cross-encoder that reads query and passage together.

    Only they are in the new run. A document whose text is not found is left out and counted; then the exit code is 3.
    """
    from m3cli.jobs.rerank import rerank_run  # noqa: PLC0415  torch, not for --help

    with show_run(request.progress) as shown:
        code = rerank_run(request, progress=shown, stdout=open_results(shown), stdin=open_stdin([request.run]))
    raise typer.Exit(code)


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
    scores = "  ".join(f"{mode} {_format_score(value)}" for mode, value in pair["scores"].items())
    lines = [("query", pair["query"]), ("passage", pair["passage"]), ("scores", pair["fault"] or scores)]
    console.print(draw_table(f"\nrow {pair['row']}", lines))
    for member, title, columns in _TABLES:
        if member in pair:
            rows = [[_format_score(row[name]) for name in columns] for row in pair[member]]
            console.print(draw_table(title, rows, columns=[name.replace("_", " ") for name in columns]))


def _format_score(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def eval_runs(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [QRELS]",
            help="TREC runs, and last the judgements: TREC, BEIR, MIRACL or MLDR (all also .gz, .zst; one may be '-'). "
            "Two or more runs alone are compared.",
            show_default=False,
        ),
    ],
    *,
    measures: Annotated[
        str, typer.Option(help="Any that trec_eval has, such as nDCG@10,P@5,Success@1,MAP@100.")
    ] = "nDCG@10,Recall@100,MRR@10,MAP",
    as_json: AsJson = False,
) -> None:
    """Measure runs against judgements: nDCG@10, Recall@100, MRR@10, MAP, and whether a run differs from the first.

    The numbers are trec_eval's with -c: means are over all judged queries, one that a run lacks counts as 0. p is of a
    paired two-sided t-test against the first run; of k comparisons at the level 0.05, look for p below 0.05 / k.

    Without judgements each run is compared with the first: overlap@10, the part of the best 10 documents that both
    have, and Kendall's tau of the documents that both have; means over the queries of both.
    """
    if len(files) < 2:
        raise UsageError(f"only {files[0]}: give one or more runs, then the file of judgements, or another run")
    from m3cli.jobs.eval import compare_runs, evaluate_runs, is_run  # noqa: PLC0415  numpy, not for --help

    *runs, qrels = files
    if is_run(qrels) and is_run(files[0]):
        _print_agreement(files[0], compare_runs(files, stdin=open_stdin(files)), as_json=as_json)
        return
    found = evaluate_runs(runs, qrels, measures=parse_names(measures), stdin=open_stdin(files))
    for line in found.describe():
        sys.stderr.write(f"m3: {escape_unprintable(line)}\n")
    if as_json:
        print_json(asdict(found))
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        _print_tsv(found)


def _print_agreement(base: str, found: Sequence[Agreement], *, as_json: bool) -> None:
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [
        [escape_unprintable(each.run), f"{each.queries:,}", f"{each.overlap:.4f}", f"{each.tau:.4f}"] for each in found
    ]
    columns = ["run", "queries", "overlap@10", "Kendall's tau"]
    if sys.stdout.isatty():
        from m3cli.tables import draw_table, open_console  # noqa: PLC0415  rich is slow

        open_console(sys.stdout).print(draw_table(f"compared with {base}", rows, columns=columns))
    else:
        sys.stdout.writelines("\t".join(cells) + "\n" for cells in [columns, *rows])


def _print_table(found: Evaluation) -> None:
    from m3cli.tables import draw_table, open_console  # noqa: PLC0415  rich is slow

    rows = [
        [
            escape_unprintable(row.run),
            *(_format_measure(value, (row.p or {}).get(name)) for name, value in row.measures.items()),
        ]
        for row in found.runs
    ]
    title = count_noun(found.queries, "query", "queries") + (", p against the first run" if len(found.runs) > 1 else "")
    open_console(sys.stdout).print(draw_table(title, rows, columns=["run", *found.runs[0].measures]))


def _format_measure(value: float, p: float | None) -> str:
    return f"{value:.4f}" if p is None else f"{value:.4f} (p {p:.3f})"


def _print_tsv(found: Evaluation) -> None:
    names = list(found.runs[0].measures)
    several = len(found.runs) > 1
    header = ["run", *names, *([f"p({name})" for name in names] if several else [])]
    sys.stdout.write("\t".join(header) + "\n")
    for row in found.runs:
        cells = [escape_unprintable(row.run), *(f"{row.measures[name]:.4f}" for name in names)]
        if several:
            cells += ["" if row.p is None else f"{row.p[name]:.4g}" for name in names]
        sys.stdout.write("\t".join(cells) + "\n")

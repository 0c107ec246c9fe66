"""`m3 eval`: measures as a table, TSV or JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.cli.options import AsJson, parse_names
from m3cli.cli.terminal import open_stdin, print_json
from m3cli.errors import UsageError, count_noun, escape_unprintable

if TYPE_CHECKING:
    from m3cli.jobs.eval import Agreement, Evaluation


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
            *(_format(value, (row.p or {}).get(name)) for name, value in row.measures.items()),
        ]
        for row in found.runs
    ]
    title = count_noun(found.queries, "query", "queries") + (", p against the first run" if len(found.runs) > 1 else "")
    open_console(sys.stdout).print(draw_table(title, rows, columns=["run", *found.runs[0].measures]))


def _format(value: float, p: float | None) -> str:
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

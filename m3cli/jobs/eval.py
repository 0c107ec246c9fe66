"""`m3 eval`: measures of runs against judgements, with a test of each run against the first; or how runs agree.

Runs are read one after the other; only the values of their queries are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from m3cli.corpus.streams import PeekableStream
from m3cli.corpus.trec import RUN_COLUMNS, read_lines, read_qrels, read_run, split_run_line
from m3cli.errors import CorpusError, UsageError, count_noun
from m3cli.retrieval.measures import (
    Values,
    compare_queries,
    compare_rankings,
    count_missing,
    count_without_relevant,
    measure_queries,
    parse_measures,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunScores:
    """Measures of a run."""

    run: str
    measures: dict[str, float]
    "means over the judged queries"
    p: dict[str, float] | None
    "of the paired t-test against the first run; None for the first"
    missing: int
    "judged queries that are not in the run; they count as 0"
    not_judged: int
    "queries of the run without judgements; they do not count"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Result of `m3 eval`."""

    qrels: str
    queries: int
    "judged queries, over which means are taken"
    without_relevant: int
    "judged queries without a relevant document: 0 by every measure"
    runs: list[RunScores] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Return what is counted in the means, as lines."""
        lines = [
            f"{count_noun(self.queries, 'judged query', 'judged queries')} in {self.qrels}, which every mean is over"
        ]
        if self.without_relevant:
            lines.append(f"{self.without_relevant:,} of them without a relevant document, 0 for every run")
        for run in self.runs:
            if run.missing:
                lines.append(
                    f"{run.run} lacks {count_noun(run.missing, 'judged query', 'judged queries')}, counted as 0"
                )
            if run.not_judged:
                not_judged = count_noun(run.not_judged, "query", "queries")
                lines.append(f"{run.run} has {not_judged} without judgements, not counted")
        return lines


def evaluate_runs(
    runs: Sequence[str], qrels: str, *, measures: Sequence[str], stdin: PeekableStream | None = None
) -> Evaluation:
    """Measure runs by the same judgements.

    Raises:
        UsageError: a measure is unknown, or a file is named twice.
        CorpusError: a file cannot be read, or a run has no judged query.
        M3Error: ir-measures is not installed.
    """
    named = [*runs, qrels]
    if len(set(named)) < len(named):
        raise UsageError(f"{next(name for name in named if named.count(name) > 1)} is named twice; name it once")
    parsed = parse_measures(measures)
    judgements = read_qrels(qrels, stdin=stdin)
    found = Evaluation(qrels=qrels, queries=len(judgements), without_relevant=count_without_relevant(judgements))
    base: Mapping[str, Values] | None = None
    for run in runs:
        rankings = read_run(run, stdin=stdin)
        missing, not_judged = count_missing(rankings, judgements)
        if missing == len(judgements):
            raise CorpusError(
                f"{run}: none of its queries (such as {next(iter(rankings))[:60]!r}) is in {qrels} "
                f"(such as {next(iter(judgements))[:60]!r}); give the judgements of the queries that were searched"
            )
        values = measure_queries(rankings, judgements, parsed)
        found.runs.append(
            RunScores(
                run=run,
                measures={name: float(each.mean()) for name, each in values.items()},
                p=None if base is None else {name: compare_queries(base[name], values[name]) for name in values},
                missing=missing,
                not_judged=not_judged,
            )
        )
        base = values if base is None else base
    return found


DEPTH = 1000
"documents of a query that are compared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a run agrees with the first, as means over queries."""

    run: str
    queries: int
    "that both have"
    overlap: float
    "part of the best 10 documents that both have"
    tau: float
    "Kendall's tau of the documents that both have; NaN if no query has two of them"


def is_run(path: str) -> bool:
    """Whether a file is a TREC run, by its first line; standard input counts as judgements."""
    if path == "-":
        return False
    return any(len(split_run_line(line)) == len(RUN_COLUMNS) for _, line in islice(read_lines(path), 1))


def compare_runs(runs: Sequence[str], *, stdin: PeekableStream | None = None) -> list[Agreement]:
    """Compare each run with the first.

    Raises:
        CorpusError: a file cannot be read, or two runs share no query.
    """
    base = read_run(runs[0], stdin=stdin, top_k=DEPTH)
    found = []
    for run in runs[1:]:
        rankings = read_run(run, stdin=stdin, top_k=DEPTH)
        shared = [query for query in base if query in rankings]
        if not shared:
            raise CorpusError(f"{run} and {runs[0]} share no query; give runs of the same queries")
        overlaps, taus = compare_rankings([(list(base[query]), list(rankings[query])) for query in shared])
        found.append(Agreement(run=run, queries=len(shared), overlap=overlaps, tau=taus))
    return found

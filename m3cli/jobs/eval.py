"""`m3 eval`: measures of runs against judgements, with a test of each run against the first; or how runs agree.

Runs are read one after the other; only the values of their queries are kept.

The numbers are those of trec_eval with `-c`: means are over all judged queries, and a query without ranking counts as
0. So runs are compared over the same queries, and omissions never help. `ir-measures` computes them with `pytrec_eval`,
which contains trec_eval's code; of equal scores the greater document id is first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.corpus.streams import PeekableStream
from m3cli.corpus.trec import RUN_COLUMNS, read_lines, read_qrels, read_run, split_run_line
from m3cli.errors import CorpusError, UsageError, count_noun
from m3cli.records import Judgements, Rankings


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


DEFAULT_MEASURES = ("nDCG@10", "Recall@100", "MRR@10", "MAP")
DEEPEST = (1 << 31) - 1
"greatest cutoff of a measure"
_TREC_EVAL = "pytrec_eval"
_NOTATION = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<settings>[^()]*)\))?\s*(?:@\s*(?P<at>[\d.]+))?\s*")

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One measure."""

    name: str
    "as the user wrote it"
    computed: Any
    "measure of ir_measures, computed by trec_eval's code"
    deepest: int | None
    "rank after which a reciprocal rank counts as 0; None: no limit"


def parse_measures(names: Sequence[str]) -> tuple[Measure, ...]:
    """Parse measures in ir_measures' notation: nDCG@10, Recall@100, MRR@10, MAP, P@5, Success@10, RR(rel=2)@10 ...

    Raises:
        UsageError: a measure is unknown or a duplicate, or trec_eval does not have it.
        M3Error: ir-measures is not installed.
    """
    measures = [_parse_measure(name) for name in names]
    if not measures or len({measure.name for measure in measures}) < len(measures):
        raise UsageError(f"--measures {','.join(names)!r}: expected measures with commas between them, each once")
    return tuple(measures)


def _parse_measure(name: str) -> Measure:
    package, known = _import_package()
    try:
        parsed = _read_notation(package, name)
        parsed.validate_params()
    except (AssertionError, KeyError, SyntaxError, ValueError) as error:
        raise UsageError(f"--measures {name!r}: not known; expected such as {', '.join(DEFAULT_MEASURES)}") from error
    deepest = parsed.params.get("cutoff")
    if parsed.NAME == "RR" and deepest is not None:
        # ir_measures computes RR with a cutoff by other code, which sorts equal scores differently.
        parsed = package.RR(**{key: value for key, value in parsed.params.items() if key != "cutoff"})
    else:
        deepest = None
    if not known.supports(parsed) or not 1 <= parsed.params.get("cutoff", 1) <= DEEPEST:
        raise UsageError(f"--measures {name!r}: trec_eval lacks it; use one such as {', '.join(DEFAULT_MEASURES)}")
    return Measure(name=name, computed=parsed, deepest=deepest)


def _read_notation(package: Any, name: str) -> Any:
    """Return the same as ir_measures' `parse_measure`, which fails on Python 3.14 (in 0.4.3)."""
    found = _NOTATION.fullmatch(name)
    if found is None:
        raise ValueError(name)
    kind = package.measures.registry[found["name"]]
    call = ast.parse(f"f({found['settings'] or ''})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(name)
    settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    if found["at"]:
        settings[kind.AT_PARAM] = ast.literal_eval(found["at"])
    return kind(**settings)


def measure_queries(rankings: Rankings, judgements: Judgements, measures: Sequence[Measure]) -> dict[str, Values]:
    """Return each measure's values [Q] of the judged queries, in order; 0 for queries without ranking."""
    _, known = _import_package()
    indices = {query: index for index, query in enumerate(judgements)}
    wanted = {query: ranking for query, ranking in rankings.items() if query in indices}
    computed = {measure.computed: np.zeros(len(indices)) for measure in measures}
    for found in known.evaluator(list(computed), judgements).iter_calc(wanted):
        computed[found.measure][indices[found.query_id]] = found.value
    return {measure.name: _cut_ranks(computed[measure.computed], measure.deepest) for measure in measures}


def _cut_ranks(values: Values, deepest: int | None) -> Values:
    """Return reciprocal ranks with those after a rank set to 0."""
    return values if deepest is None else np.where(values > 1 / (deepest + 0.5), values, 0.0)


def compare_queries(base: Values, other: Values) -> float:
    """Return p of the paired two-sided t-test over queries; 1 if no query differs, NaN for fewer than two queries."""
    from scipy import stats  # noqa: PLC0415  a second, only where runs are compared

    difference = other - base
    if len(difference) < 2:
        return float("nan")
    if np.ptp(difference) <= 1e-12:  # t is undefined: all queries differ equally
        return 1.0 if abs(difference[0]) <= 1e-12 else 0.0
    return float(stats.ttest_rel(other, base).pvalue)


def compare_rankings(pairs: Sequence[tuple[Sequence[str], Sequence[str]]], *, depth: int = 10) -> tuple[float, float]:
    """Return the mean overlap of the best `depth` documents, and the mean of Kendall's tau of the shared documents.

    Args:
        pairs: two rankings of each query, best first.
        depth: of the overlap; two shorter rankings are compared by the length of the longer one.
    """
    from scipy.stats import kendalltau  # noqa: PLC0415  a second

    overlaps, taus = [], []
    for first, second in pairs:
        longest = min(depth, max(len(first), len(second)))
        overlaps.append(len({*first[:depth]} & {*second[:depth]}) / longest)
        ranks = {document: rank for rank, document in enumerate(second)}
        shared = [ranks[document] for document in first if document in ranks]
        if len(shared) > 1:
            taus.append(float(kendalltau(np.arange(len(shared)), shared).statistic))
    return float(np.mean(overlaps)), float(np.mean(taus)) if taus else np.nan


def count_missing(rankings: Rankings, judgements: Judgements) -> tuple[int, int]:
    """Return the number of judged queries without ranking, and of rankings without judgements."""
    return len(judgements.keys() - rankings.keys()), len(rankings.keys() - judgements.keys())


def count_without_relevant(judgements: Judgements) -> int:
    """Return the number of judged queries without a relevant document."""
    return sum(all(relevance <= 0 for relevance in judged.values()) for judged in judgements.values())


def _import_package() -> tuple[Any, Any]:
    """Return ir_measures and its provider of trec_eval's code."""
    try:
        import ir_measures  # noqa: PLC0415  an optional package
    except ImportError as error:
        raise UsageError("m3 eval needs ir-measures; install it with: pip install 'm3cli[eval]'") from error
    return ir_measures, getattr(ir_measures, _TREC_EVAL)

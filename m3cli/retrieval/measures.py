"""Measures of rankings by judgements (nDCG, recall, MRR, MAP) for each query, and comparisons of runs.

The numbers are those of trec_eval with `-c`: means are over all judged queries, and a query without ranking counts as
0. So runs are compared over the same queries, and omissions never help. `ir-measures` computes them with `pytrec_eval`,
which contains trec_eval's code; of equal scores the greater document id is first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.errors import UsageError
from m3cli.records import Judgements, Rankings

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

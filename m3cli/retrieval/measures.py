"""What a ranking is worth, by judgements: nDCG, recall, MRR, MAP of each query as trec_eval has them, and comparisons.

The numbers are those of trec_eval with `-c`: the mean is over all queries of the judgements, and a query that the run
lacks counts as 0. So a run is never better for what it left out, and runs are compared over the same queries. Computed
by `ir-measures` over `pytrec_eval`, which holds trec_eval's own code; of equal scores the greater document id is first.
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
"rank that a measure can be cut at"
_TREC_EVAL = "pytrec_eval"
_NOTATION = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<settings>[^()]*)\))?\s*(?:@\s*(?P<at>[\d.]+))?\s*")

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One measure."""

    name: str
    "as it was asked for"
    computed: Any
    "ir_measures' measure that trec_eval's code computes"
    deepest: int | None
    "rank below which a reciprocal rank counts as 0; None: no rank does"


def parse_measures(names: Sequence[str]) -> tuple[Measure, ...]:
    """Read measures in ir_measures' notation: nDCG@10, Recall@100, MRR@10, MAP, P@5, Success@10, RR(rel=2)@10 ...

    Raises:
        UsageError: one is not known, is named twice, or trec_eval does not have it.
        M3Error: ir-measures is not installed.
    """
    made = [_parse_measure(name) for name in names]
    if not made or len({measure.name for measure in made}) < len(made):
        raise UsageError(f"--measures {','.join(names)!r}: expected measures with commas between them, each once")
    return tuple(made)


def _parse_measure(name: str) -> Measure:
    package, known = _import_package()
    try:
        parsed = _read_notation(package, name)
        parsed.validate_params()
    except (AssertionError, KeyError, SyntaxError, ValueError) as error:
        raise UsageError(f"--measures {name!r}: not known; expected such as {', '.join(DEFAULT_MEASURES)}") from error
    deepest = parsed.params.get("cutoff")
    if parsed.NAME == "RR" and deepest is not None:
        # ir_measures leaves RR with a cutoff to other code, in which the smaller id of equal scores is first.
        parsed = package.RR(**{key: value for key, value in parsed.params.items() if key != "cutoff"})
    else:
        deepest = None
    if not known.supports(parsed) or not 1 <= parsed.params.get("cutoff", 1) <= DEEPEST:
        raise UsageError(f"--measures {name!r}: trec_eval does not have it; take such as {', '.join(DEFAULT_MEASURES)}")
    return Measure(name=name, computed=parsed, deepest=deepest)


def _read_notation(package: Any, name: str) -> Any:
    """Return ir_measures' measure as its own `parse_measure` would, which Python 3.14 cannot run (in 0.4.3)."""
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
    """Return each measure's values [Q] of the judged queries in their order; 0 for those that the run lacks."""
    _, known = _import_package()
    places = {query: place for place, query in enumerate(judgements)}
    wanted = {query: ranking for query, ranking in rankings.items() if query in places}
    computed = {measure.computed: np.zeros(len(places)) for measure in measures}
    for found in known.evaluator(list(computed), judgements).iter_calc(wanted):
        computed[found.measure][places[found.query_id]] = found.value
    return {measure.name: _cut_ranks(computed[measure.computed], measure.deepest) for measure in measures}


def _cut_ranks(values: Values, deepest: int | None) -> Values:
    """Set reciprocal ranks below a rank to 0."""
    return values if deepest is None else np.where(values > 1 / (deepest + 0.5), values, 0.0)


def compare_queries(base: Values, other: Values) -> float:
    """Return p of the paired two-sided t-test over queries; 1 if no query differs, NaN for fewer than two queries."""
    from scipy import stats  # noqa: PLC0415  a second, only where runs are compared

    difference = other - base
    if len(difference) < 2:
        return float("nan")
    if np.ptp(difference) <= 1e-12:  # no spread, no t: all queries alike
        return 1.0 if abs(difference[0]) <= 1e-12 else 0.0
    return float(stats.ttest_rel(other, base).pvalue)


def count_missing(rankings: Rankings, judgements: Judgements) -> tuple[int, int]:
    """Count the judged queries that a run lacks, and the queries of a run that are not judged."""
    return len(judgements.keys() - rankings.keys()), len(rankings.keys() - judgements.keys())


def count_without_relevant(judgements: Judgements) -> int:
    """Count the judged queries that have no relevant document."""
    return sum(all(relevance <= 0 for relevance in judged.values()) for judged in judgements.values())


def _import_package() -> tuple[Any, Any]:
    """Return ir_measures and its provider that runs trec_eval's code."""
    try:
        import ir_measures  # noqa: PLC0415  an optional package
    except ImportError as error:
        raise UsageError("m3 eval needs ir-measures; install it with: pip install 'm3cli[eval]'") from error
    return ir_measures, getattr(ir_measures, _TREC_EVAL)

"""Measures equal trec_eval's on random runs with ties, and comparisons equal scipy's."""

from __future__ import annotations

import ast
import builtins
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from m3cli.errors import M3Error, UsageError
from m3cli.jobs.eval import (
    DEFAULT_MEASURES,
    compare_queries,
    count_missing,
    count_without_relevant,
    measure_queries,
    parse_measures,
)
from m3cli.records import Judgements, Rankings

DOCUMENTS = [f"d{number}" for number in range(30)]
# Few scores, so that most of them are tied.
rankings_of = st.dictionaries(
    st.sampled_from(["q0", "q1", "q2", "q3"]),
    st.dictionaries(st.sampled_from(DOCUMENTS), st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=1),
)
judgements_of = st.dictionaries(
    st.sampled_from(["q0", "q1", "q2", "q4"]),
    st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1),
    min_size=1,
)


def cut_as_trec_eval(rankings: Rankings, depth: int) -> dict[str, dict[str, float]]:
    """What `trec_eval -M depth` looks at: the best by score, of equal scores the greater id."""
    return {
        query: dict(sorted(ranking.items(), key=lambda entry: (entry[1], entry[0]), reverse=True)[:depth])
        for query, ranking in rankings.items()
    }


def run_trec_eval(rankings: Rankings, judgements: Judgements, measure: str) -> dict[str, float]:
    if not rankings:
        return {}
    # The name that goes in has a dot before the depth, the one that comes out has none.
    found = pytrec_eval.RelevanceEvaluator(judgements, {measure}).evaluate(rankings)
    return {query: values[measure.replace(".", "_")] for query, values in found.items()}


@given(rankings_of, judgements_of)
def test_values_are_trec_evals(rankings: Rankings, judgements: Judgements) -> None:
    found = measure_queries(rankings, judgements, parse_measures((*DEFAULT_MEASURES, "P@5", "MRR")))
    expected = {
        "nDCG@10": run_trec_eval(rankings, judgements, "ndcg_cut.10"),
        "Recall@100": run_trec_eval(rankings, judgements, "recall.100"),
        "MRR@10": run_trec_eval(cut_as_trec_eval(rankings, 10), judgements, "recip_rank"),
        "MAP": run_trec_eval(rankings, judgements, "map"),
        "P@5": run_trec_eval(rankings, judgements, "P.5"),
        "MRR": run_trec_eval(rankings, judgements, "recip_rank"),
    }
    assert list(found) == list(expected)
    for measure, by_query in expected.items():
        wanted = [by_query.get(query, 0.0) for query in judgements]
        np.testing.assert_allclose(found[measure], wanted, atol=1e-6, err_msg=measure)


def test_by_hand() -> None:
    judgements = {"q": {"a": 1, "b": 2}, "none": {"a": 0}, "missing": {"a": 1}}
    rankings = {"q": {"x": 3.0, "a": 2.0, "b": 1.0}, "none": {"a": 1.0}, "stranger": {"a": 1.0}}
    found = measure_queries(rankings, judgements, parse_measures(DEFAULT_MEASURES))
    best = 2 + 1 / np.log2(3)
    np.testing.assert_allclose(found["nDCG@10"], [(1 / np.log2(3) + 2 / np.log2(4)) / best, 0, 0])
    np.testing.assert_allclose(found["MRR@10"], [1 / 2, 0, 0])
    np.testing.assert_allclose(found["MAP"], [(1 / 2 + 2 / 3) / 2, 0, 0])
    np.testing.assert_allclose(found["Recall@100"], [1, 0, 0])
    assert count_missing(rankings, judgements) == (1, 1)
    assert count_without_relevant(judgements) == 1


def test_a_reciprocal_rank_is_cut_between_ranks() -> None:
    rankings = {"q": {f"d{rank:02}": -float(rank) for rank in range(1, 13)}}
    for rank, expected in ((10, 0.1), (11, 0.0)):
        found = measure_queries(rankings, {"q": {f"d{rank:02}": 1}}, parse_measures(["MRR@10"]))
        assert found["MRR@10"] == pytest.approx([expected])


@given(st.integers(3, 40), st.integers(0, 1000))
def test_p_is_scipys(num_queries: int, seed: int) -> None:
    base, other = np.random.default_rng(seed).random((2, num_queries))
    assert compare_queries(base, other) == pytest.approx(stats.ttest_rel(base, other).pvalue)


def test_p_where_there_is_no_spread() -> None:
    values = np.array([0.1, 0.7, 0.3])
    assert compare_queries(values, values.copy()) == 1.0
    assert compare_queries(values, values + 0.1) == 0.0
    assert np.isnan(compare_queries(values[:1], values[1:2]))


@pytest.mark.parametrize(
    "names", [["nope"], ["nDCG@x"], ["ERR@10"], ["nDCG@0"], ["nDCG@99999999999999999999"], ["P"], [], ["MAP", "MAP"]]
)
def test_unknown_measures_are_refused(names: list[str]) -> None:
    with pytest.raises(UsageError, match="--measures"):
        parse_measures(names)


def test_measures_are_read_where_python_has_no_number_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """ir_measures 0.4.3 asks for them, and Python 3.14 has none."""
    for gone in {"Num", "Str", "NameConstant"} & vars(ast).keys():
        monkeypatch.delattr(ast, gone)
    names = ["nDCG@10", " nDCG @ 10", "MAP", "RR(rel=2)@10", "P(rel=2, judged_only=False)@5", "IPrec@0.1"]
    computed = [str(measure.computed) for measure in parse_measures(names)]
    assert computed == ["nDCG@10", "nDCG@10", "AP", "RR(rel=2)", "P(rel=2)@5", "IPrec@0.1"]


@pytest.mark.parametrize("name", ["P(5)", "P(rel=x)@5", "P(rel=1", "P(rel=1)(rel=1)@5", "P(**{})@5", "P@5@5", "@5", ""])
def test_other_notations_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--measures"):
        parse_measures([name])


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "ir_measures":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(M3Error, match=r"pip install 'm3cli\[eval\]'"):
        parse_measures(["MAP"])

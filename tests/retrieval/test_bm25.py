"""BM25 against the formula, and what plain words are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from m3cli.jobs.search.bm25 import K1, B, Bm25Index, plain_terms
from m3cli.retrieval.scores import TopRows

TEXTS = ["a fox and a dog", "the dog", "狐狸 fox", "nothing here at all, nothing"]


def by_formula(query: str, text: list[str], texts: list[list[str]]) -> float:
    mean = sum(map(len, texts)) / len(texts)
    score = 0.0
    for term in plain_terms([query])[0]:
        having = sum(term in each for each in texts)
        if having:
            idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            count = text.count(term)
            score += idf * count / (count + K1 * (1 - B + B * len(text) / mean))
    return score


def test_scores_are_the_formulas() -> None:
    index = Bm25Index(plain_terms)
    index.add(TEXTS[:3])
    index.add(TEXTS[3:])
    queries = ["Fox DOG?", "狐", "unknown", "fox fox"]
    top = TopRows(len(queries), limit=10, threshold=0.0)
    index.search(queries, top, positions=np.arange(4), keys=np.arange(4))
    ranked = top.finish()
    terms = plain_terms(TEXTS)
    for number, query in enumerate(queries):
        expected = {row: score for row in range(4) if (score := by_formula(query, terms[row], terms)) > 0}
        part = ranked.query == number
        result = dict(zip(ranked.row[part].tolist(), ranked.score[part].tolist(), strict=True))
        assert result == pytest.approx(expected, abs=1e-5)


def test_plain_words() -> None:
    assert plain_terms(["Été_2024, 数据 data-base ﬁn"]) == [["été", "2024", "数", "据", "data", "base", "fin"]]
    assert plain_terms(["", "?!"]) == [[], []]


def test_texts_without_terms() -> None:
    index, top = Bm25Index(plain_terms), TopRows(1, limit=1, threshold=0.0)
    index.add(["?", ""])
    index.search(["x"], top, positions=np.arange(2), keys=np.arange(2))
    assert len(top.finish().row) == 0

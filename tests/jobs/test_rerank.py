"""How the work of re-ranking is cut: windows hold no more than they may, and lose and repeat nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.jobs import rerank as module
from m3cli.jobs.rerank import _cut_groups, _cut_windows, rerank_run
from m3cli.progress import Progress
from m3cli.requests import RerankRequest

rankings_of = st.dictionaries(
    st.text("q01", min_size=1, max_size=4), st.dictionaries(st.sampled_from("abcdefgh"), st.just(0.0), min_size=1)
)


@given(rankings_of, st.integers(1, 8))
def test_windows_hold_what_they_may(rankings: dict[str, dict[str, float]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD_TOKENS", most * 100)
        windows = list(_cut_windows(rankings, 100))
    assert [query for window in windows for query in window] == list(rankings)
    for window in windows:
        assert len(window) == 1 or len({name for query in window for name in rankings[query]}) <= most


@given(rankings_of, st.integers(1, 8))
def test_groups_are_full_and_lose_nothing(rankings: dict[str, dict[str, float]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_PAIRS", most)
        groups = list(_cut_groups(list(rankings), rankings))
    assert [query for group in groups for query in group] == list(rankings)
    assert all(sum(len(rankings[query]) for query in group) >= most for group in groups[:-1])


@pytest.fixture
def rerank(cross_encoder: Path, tmp_path: Path) -> Callable[[], bytes]:
    words = ["panda", "bear", "fox", "dog", "river", "stone", "house", "light", "dark", "green"]
    corpus = "".join(f"d{place}\t{' '.join(words[place % 7 : place % 7 + 3]) * (place + 1)}\n" for place in range(12))
    (tmp_path / "corpus.tsv").write_text(corpus)
    (tmp_path / "queries.tsv").write_text("q1\tgreen house\nq2\tfox\nq3\triver stone\n")
    run = "".join(f"q{q} Q0 d{d} 1 {-d} t\n" for q in (2, 1, 3) for d in range(12) if (d + q) % 3)
    (tmp_path / "run.trec").write_text(run)

    def make() -> bytes:
        output = io.BytesIO()
        request = RerankRequest(
            run=str(tmp_path / "run.trec"),
            queries=str(tmp_path / "queries.tsv"),
            corpus=str(tmp_path / "corpus.tsv"),
            model=str(cross_encoder),
            dtype="float32",
            device="cpu",
        )
        assert rerank_run(request, progress=Progress("none"), stdout=output) == 0
        return output.getvalue()

    return make


def test_windows_and_groups_do_not_change_the_run(rerank: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [line.split("\t") for line in rerank().decode().splitlines()]
    assert [row[0] for row in whole] == ["q2"] * 8 + ["q1"] * 8 + ["q3"] * 8
    monkeypatch.setattr(module, "HELD_TOKENS", 8 * 1024)
    monkeypatch.setattr(module, "GROUP_PAIRS", 1)
    monkeypatch.setattr(module, "_TEXTS", 3)
    parts = [line.split("\t") for line in rerank().decode().splitlines()]
    assert [row[:4] for row in parts] == [row[:4] for row in whole]
    for mine, theirs in zip(parts, whole, strict=True):
        assert float(mine[4]) == pytest.approx(float(theirs[4]), abs=1e-4)

"""Windows and groups of re-ranking, and the texts found by id."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.errors import CorpusError, UsageError
from m3cli.jobs import rerank as module
from m3cli.jobs.rerank import TextSource, _cut_groups, _cut_windows, rerank_run
from m3cli.progress import Progress
from m3cli.requests import RerankRequest

rankings_of = st.dictionaries(
    st.text("q01", min_size=1, max_size=4), st.dictionaries(st.sampled_from("abcdefgh"), st.just(0.0), min_size=1)
)


@given(rankings_of, st.integers(1, 8))
def test_windows_are_bounded_and_complete(rankings: dict[str, dict[str, float]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD_TOKENS", most * 100)
        windows = list(_cut_windows(rankings, 100))
    assert [query for window in windows for query in window] == list(rankings)
    for window in windows:
        assert len(window) == 1 or len({name for query in window for name in rankings[query]}) <= most


@given(rankings_of, st.integers(1, 8))
def test_groups_are_full_and_complete(rankings: dict[str, dict[str, float]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_PAIRS", most)
        groups = list(_cut_groups(list(rankings), rankings))
    assert [query for group in groups for query in group] == list(rankings)
    assert all(sum(len(rankings[query]) for query in group) >= most for group in groups[:-1])


@pytest.fixture
def rerank(cross_encoder: Path, tmp_path: Path) -> Callable[[], bytes]:
    words = ["panda", "bear", "fox", "dog", "river", "stone", "tower", "light", "dark", "green"]
    corpus = "".join(
        f"d{number}\t{' '.join(words[number % 7 : number % 7 + 3]) * (number + 1)}\n" for number in range(12)
    )
    (tmp_path / "corpus.tsv").write_text(corpus)
    (tmp_path / "queries.tsv").write_text("q1\tgreen tower\nq2\tfox\nq3\triver stone\n")
    run = "".join(f"q{q} Q0 d{d} 1 {-d} t\n" for q in (2, 1, 3) for d in range(12) if (d + q) % 3)
    (tmp_path / "run.trec").write_text(run)

    def run_rerank() -> bytes:
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

    return run_rerank


def test_windows_and_groups_do_not_change_the_run(rerank: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [line.split("\t") for line in rerank().decode().splitlines()]
    assert [row[0] for row in whole] == ["q2"] * 8 + ["q1"] * 8 + ["q3"] * 8
    monkeypatch.setattr(module, "HELD_TOKENS", 8 * 1024)
    monkeypatch.setattr(module, "GROUP_PAIRS", 1)
    monkeypatch.setattr(module, "_TEXTS", 3)
    parts = [line.split("\t") for line in rerank().decode().splitlines()]
    assert [row[:4] for row in parts] == [row[:4] for row in whole]
    for first, second in zip(parts, whole, strict=True):
        assert float(first[4]) == pytest.approx(float(second[4]), abs=1e-4)


JSONL = (
    '{"_id": "1", "title": "T", "text": "one"}\n{"_id": 2, "text": "two"}\n{"_id": "2", "text": "later"}\n{"_id": "3'
)


def find(path: Path, *wanted: str, **fields: Any) -> dict[str, str]:
    return dict(TextSource(given=str(path), flag="--corpus", **fields).find_texts(wanted))


def test_texts_of_jsonl_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(JSONL)
    assert find(path, "2", "1", "3") == {"1": "T\none", "2": "two"}
    assert find(path, "1", title_sep=" ") == {"1": "T one"}
    assert find(path, "1", title_field="") == {"1": "one"}
    assert find(path, "4") == {}


def test_texts_of_tsv_without_header_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "topics.tsv"
    path.write_text("12#0\twho?\n13#0\twhere?\n")
    assert find(path, "13#0") == {"13#0": "where?"}


def test_texts_of_parquet_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"docid": ["a", "b"], "text": ["one", "two"]}), path)
    assert find(path, "b") == {"b": "two"}


def test_missing_ids_and_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--corpus -: texts are looked up by id"):
        find(Path("-"), "a")
    (tmp_path / "c.jsonl").write_text('{"text": "no id"}\n')
    with pytest.raises(UsageError, match="no field with a known name for ids"):
        find(tmp_path / "c.jsonl", "a")
    with pytest.raises(CorpusError, match="no such file"):
        find(tmp_path / "nowhere", "a")


def test_texts_of_csv_are_found_and_an_error_names_no_missing_option(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text('id,text\na,"b\nc"\n')
    assert find(path, "a") == {"a": "b\nc"}
    path.write_text('id,"te"xt\na,b\n')
    with pytest.raises(CorpusError, match="cannot be read as CSV") as caught:
        list(TextSource(given=str(path), flag="--queries").find_texts({"a"}))
    assert "--input-format" not in str(caught.value)

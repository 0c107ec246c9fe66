"""Rankings: columns, digits, ids with tabs and line breaks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from m3cli.corpus.trec import read_run
from m3cli.errors import UsageError
from m3cli.records import QueryHits
from m3cli.store.results import open_ranking, ranking_format


def make_hits(query: str, ids: tuple[str, ...], scores: list[float]) -> QueryHits:
    zeros = np.zeros(len(ids), np.int64)
    return QueryHits(
        query=query,
        text=None,
        ids=ids,
        scores=np.array(scores, np.float32),
        parts={},
        chunk_index=zeros,
        char_start=zeros,
        char_end=zeros,
        texts=(None,) * len(ids),
    )


def test_a_ranking_is_read_back(tmp_path: Path) -> None:
    close = [0.7, float(np.nextafter(np.float32(0.7), np.float32(0)))]
    with open_ranking(str(tmp_path / "x.trec"), io.BytesIO(), kind="trec", tag="t") as ranking:
        ranking.write([make_hits("q", ("b", "a c"), close), make_hits("none", (), [])])
        assert ranking.blanks == 1
    lines = (tmp_path / "x.trec").read_text().splitlines()
    assert lines[0].split(" ")[:4] == ["q", "Q0", "b", "1"]
    back = read_run(str(tmp_path / "x.trec"))
    assert list(back["q"]) == ["b", "a c"]
    assert back["q"]["b"] > back["q"]["a c"], "float32 next to each other stay apart"
    assert list(back) == ["q"]


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\u2028b"])
def test_ids_with_line_breaks_are_errors_and_no_file_is_written(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(UsageError, match=r"cannot hold ids with tabs or line breaks; write --out NAME\.jsonl"),
        open_ranking(str(tmp_path / "x.trec"), io.BytesIO(), kind="trec", tag="t") as ranking,
    ):
        ranking.write([make_hits("q", (name,), [1.0])])
    assert list(tmp_path.iterdir()) == []


def test_a_ranking_is_written_completely_or_not_at_all() -> None:
    stdout = io.BytesIO()
    good, bad = make_hits("q1", ("a", "b"), [2.0, 1.0]), make_hits("q2", ("c", "d\te"), [2.0, 1.0])
    with (
        pytest.raises(UsageError, match=r"document 'd\\te'"),
        open_ranking(None, stdout, kind="trec", tag="t") as ranking,
    ):
        ranking.write([good, bad])
    assert stdout.getvalue() == b""
    with pytest.raises(UsageError, match=r"query 'q\\n'"), open_ranking(None, stdout, kind="trec", tag="t") as ranking:
        ranking.write([good, make_hits("q\n", ("a",), [1.0])])
    assert stdout.getvalue() == b""


def test_formats_of_suffixes() -> None:
    assert [ranking_format(out) for out in (None, "-", "x.RUN", "x.jsonl")] == ["trec", "trec", "trec", "jsonl"]
    assert ranking_format("x.whatever", typed="jsonl") == ranking_format(None, typed="jsonl") == "jsonl"
    with pytest.raises(UsageError, match=r"x.tsv: its ending tells the format"):
        ranking_format("x.tsv")

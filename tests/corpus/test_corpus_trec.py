"""Reading runs: what a line is, which order holds, and that a bad line is named."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.streams import PeekableStream
from m3cli.corpus.trec import read_run
from m3cli.errors import CorpusError

RUN = "q1 Q0 a 1 2.5 t\nq1\tQ0\tb c\t2\t-1e-3\tt\n\nq2 Q0 a 1 0 t\r\n"
PARSED = {"q1": {"a": 2.5, "b c": -1e-3}, "q2": {"a": 0.0}}


def write(folder: Path, text: str, name: str = "run.trec") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_run(tmp_path: Path) -> None:
    assert read_run(write(tmp_path, RUN)) == PARSED
    assert read_run(write(tmp_path, "\ufeff" + RUN.rstrip())) == PARSED


def test_compressed_and_piped(tmp_path: Path) -> None:
    packed = tmp_path / "run.trec.gz"
    packed.write_bytes(gzip.compress(RUN.encode()))
    assert read_run(str(packed)) == PARSED
    assert read_run("-", stdin=PeekableStream(io.BytesIO(RUN.encode()))) == PARSED


def test_the_best_of_each_query_are_kept_and_equal_scores_keep_their_order(tmp_path: Path) -> None:
    lines = [("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 3.0)]
    text = "".join(f"q Q0 {document} 1 {score} t\n" for document, score in lines)
    assert list(read_run(write(tmp_path, text), top_k=3)["q"].items()) == [("b", 3.0), ("d", 3.0), ("c", 2.0)]


@given(
    st.dictionaries(
        st.text("qä1#", min_size=1, max_size=4),
        st.dictionaries(st.text("d7_-狐", min_size=1, max_size=6), st.floats(-1e6, 1e6), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rankings: dict[str, dict[str, float]]
) -> None:
    text = "".join(f"{q} Q0 {d} 0 {s!r} t\n" for q, ranking in rankings.items() for d, s in ranking.items())
    found = read_run(write(tmp_path_factory.mktemp("run"), text))
    assert found == rankings
    assert list(found) == list(rankings)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("q1 Q0 z 1 2.5", "line 5: 5 columns, not 6; expected 'query Q0 document rank score tag'"),
        ("q1 Q0 z 1 high t", "line 5: score 'high' is no finite number"),
        ("q1 Q0 z 1 nan t", "line 5: score 'nan' is no finite number"),
        ("q1 Q0 a 1 3 t", "line 5: document 'a' is there twice for query 'q1'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(CorpusError, match=r"run\.trec") as caught:
        read_run(write(tmp_path, RUN + line + "\n"))
    assert words in str(caught.value)


def test_what_is_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is empty, no run"):
        read_run(write(tmp_path, ""))
    with pytest.raises(CorpusError, match="standard input is empty: there is no run in it"):
        read_run("-", stdin=PeekableStream(io.BytesIO(b"")))
    with pytest.raises(CorpusError, match="holds no line of a run"):
        read_run(write(tmp_path, "\n \n"))
    with pytest.raises(CorpusError, match="is a folder"):
        read_run(str(tmp_path))
    with pytest.raises(CorpusError, match="no such file"):
        read_run(str(tmp_path / "nowhere"))
    (tmp_path / "latin").write_bytes(b"q1 Q0 \xe4 1 1 t\n")
    with pytest.raises(CorpusError, match="line 1: not UTF-8"):
        read_run(str(tmp_path / "latin"))


def test_a_pattern_that_names_several_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.tsv", "b.tsv"):
        write(tmp_path, RUN, name)
    with pytest.raises(CorpusError, match=r"\*\.tsv matches 2 files, a\.tsv and others; name one"):
        read_run(str(tmp_path / "*.tsv"))
    assert read_run(str(tmp_path / "a*.tsv")) == PARSED

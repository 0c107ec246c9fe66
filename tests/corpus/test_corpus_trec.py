"""Reading runs: what a line is, which order holds, and that a bad line is named."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.corpus.streams import PeekableStream
from m3cli.corpus.trec import read_qrels, read_run
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
        ("q1 Q0 z 1 high t", "line 5: score 'high' is not a finite number"),
        ("q1 Q0 z 1 nan t", "line 5: score 'nan' is not a finite number"),
        ("q1 Q0 a 1 3 t", "line 5: document 'a' occurs twice for query 'q1'"),
    ],
)
def test_an_invalid_line_of_a_run_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(CorpusError, match=r"run\.trec") as caught:
        read_run(write(tmp_path, RUN + line + "\n"))
    assert words in str(caught.value)


def test_what_is_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is empty, no run"):
        read_run(write(tmp_path, ""))
    with pytest.raises(CorpusError, match="standard input is empty, no run"):
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


JUDGEMENTS = {"q1": {"a": 1, "b": 0}, "2": {"c": 2}}
MLDR = [
    {"query_id": "q1", "query": "?", "positive_passages": [{"docid": "a"}], "negative_passages": [{"docid": "b"}]},
    {"query_id": 7, "query": "?", "positive_passages": [{"docid": "c", "text": "..."}]},
]
FORMATS = {
    "TREC": "q1 0 a 1\nq1 0 b 0\n\n2 0 c 2\n",
    "MIRACL": "q1\tQ0\ta\t1\r\nq1\tQ0\tb\t0\r\n2\tQ0\tc\t2\r\n",
    "BEIR": "query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\n2\tc\t2.0\n",
    "other header": "qid\tdocid\trelevance\nq1\ta\t1\nq1\tb\t0\n2\tc\t2\n",
    "FlagEmbedding": '{"qid": "q1", "docid": "a", "relevance": 1}\n{"qid": "q1", "docid": "b", "relevance": 0}\n'
    '{"qid": 2, "docid": "c", "relevance": 2}\n',
    "BEIR as JSON": '{"query-id": "q1", "corpus-id": "a", "score": 1}\n'
    '{"query-id": "q1", "corpus-id": "b", "score": 0}\n'
    '{"query-id": "2", "corpus-id": "c", "score": 2.0}',
}


def write_qrels(folder: Path, text: str | bytes) -> str:
    path = folder / "qrels"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    assert read_qrels(write_qrels(tmp_path, FORMATS[name])) == JUDGEMENTS


def test_mldr(tmp_path: Path) -> None:
    rows = b"\n".join(orjson.dumps(row) for row in MLDR)
    assert read_qrels(write_qrels(tmp_path, rows)) == {"q1": {"a": 1, "b": 0}, "7": {"c": 1}}


def test_a_query_without_passages_counts_as_judged(tmp_path: Path) -> None:
    rows = [*MLDR, {"query_id": "q9", "query": "?", "positive_passages": [], "negative_passages": []}]
    assert read_qrels(write_qrels(tmp_path, b"\n".join(map(orjson.dumps, rows))))["q9"] == {}


def test_the_same_judgement_twice_is_one(tmp_path: Path) -> None:
    assert read_qrels(write_qrels(tmp_path, "q 0 a 1\nq 0 a 1\n")) == {"q": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q1 0 a 1\nq1 0 b\n", "line 2: 3 columns, not 4; expected TREC's"),
        ("q1 0 a yes\n", "line 1: relevance 'yes' is not an integer"),
        ("q1 0 a 0.5\n", "line 1: relevance '0.5' is not an integer"),
        ("q1 0 a 1\nq1 0 a 0\n", "line 2: document 'a' of query 'q1' has relevance 0, and 1 in an earlier line"),
        ("q1 Q0 a 1 2.5 tag\n", "line 1: 6 columns without a known header"),
        ("q1\ta\t1\n", "line 1: 3 columns without a known header"),
        ("query-id\tcorpus-id\tscore\nq1\ta\n", "line 2: 2 columns, not 3"),
        ("query-id\tcorpus-id\tscore\n", "holds no judgements"),
        ("\n\n", "holds no judgements"),
        ('{"qid": "q", "docid": "a", "relevance": 1}\n{"qid": }\n', "line 2: invalid JSON"),
        ('{"qid": "q", "relevance": 1}\n', "line 1: none of corpus-id"),
        ('{"qid": ["q"], "docid": "a", "relevance": 1}\n', "line 1: id ['q'] is neither a string nor an integer"),
        ('{"query_id": "q", "positive_passages": ["a"]}\n', "line 1: positive_passages is not a list of objects"),
        ('{"query_id": "q", "positive_passages": 5}\n', "line 1: positive_passages is not a list of objects"),
        ("q1 0 a 1e30\n", "line 1: relevance '1e30' is too large: at most 1,000,000"),
        ("q1 0 a -99999999999999999999\n", "line 1: relevance '-99999999999999999999' is too large"),
    ],
)
def test_an_invalid_judgement_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CorpusError) as caught:
        read_qrels(write_qrels(tmp_path, text))
    assert words in str(caught.value)


def test_a_passage_that_is_positive_and_negative_is_positive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {
        "query_id": "q",
        "positive_passages": [{"docid": "a"}],
        "negative_passages": [{"docid": "a"}, {"docid": "b"}],
    }
    assert read_qrels(write_qrels(tmp_path, orjson.dumps(row))) == {"q": {"a": 1, "b": 0}}
    assert "1 passage is positive and negative at once, counted as positive; the first: 'a' of query 'q'" in caplog.text

"""Reading judgements: each benchmark's shape is known by its content, and a bad line is named."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from m3cli.corpus.trec import read_qrels
from m3cli.errors import CorpusError

PARSED = {"q1": {"a": 1, "b": 0}, "2": {"c": 2}}
MLDR = [
    {"query_id": "q1", "query": "?", "positive_passages": [{"docid": "a"}], "negative_passages": [{"docid": "b"}]},
    {"query_id": 7, "query": "?", "positive_passages": [{"docid": "c", "text": "..."}]},
]
SHAPES = {
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


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "qrels"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path: Path, shape: str) -> None:
    assert read_qrels(write(tmp_path, SHAPES[shape])) == PARSED


def test_mldr(tmp_path: Path) -> None:
    rows = b"\n".join(orjson.dumps(row) for row in MLDR)
    assert read_qrels(write(tmp_path, rows)) == {"q1": {"a": 1, "b": 0}, "7": {"c": 1}}


def test_a_query_without_passages_counts_as_judged(tmp_path: Path) -> None:
    rows = [*MLDR, {"query_id": "q9", "query": "?", "positive_passages": [], "negative_passages": []}]
    assert read_qrels(write(tmp_path, b"\n".join(map(orjson.dumps, rows))))["q9"] == {}


def test_the_same_judgement_twice_is_one(tmp_path: Path) -> None:
    assert read_qrels(write(tmp_path, "q 0 a 1\nq 0 a 1\n")) == {"q": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q1 0 a 1\nq1 0 b\n", "line 2: 3 columns, not 4; expected TREC's"),
        ("q1 0 a yes\n", "line 1: relevance 'yes' is no whole number"),
        ("q1 0 a 0.5\n", "line 1: relevance '0.5' is no whole number"),
        ("q1 0 a 1\nq1 0 a 0\n", "line 2: document 'a' of query 'q1' has relevance 0, and 1 in a line before"),
        ("q1 Q0 a 1 2.5 tag\n", "line 1: 6 columns without a known header"),
        ("q1\ta\t1\n", "line 1: 3 columns without a known header"),
        ("query-id\tcorpus-id\tscore\nq1\ta\n", "line 2: 2 columns, not 3"),
        ("query-id\tcorpus-id\tscore\n", "holds no judgements"),
        ("\n\n", "holds no judgements"),
        ('{"qid": "q", "docid": "a", "relevance": 1}\n{"qid": }\n', "line 2: invalid JSON"),
        ('{"qid": "q", "relevance": 1}\n', "line 1: none of corpus-id"),
        ('{"qid": ["q"], "docid": "a", "relevance": 1}\n', "line 1: id ['q'] is neither a string nor an integer"),
        ('{"query_id": "q", "positive_passages": ["a"]}\n', "line 1: positive_passages is no list of objects"),
        ('{"query_id": "q", "positive_passages": 5}\n', "line 1: positive_passages is no list of objects"),
        ("q1 0 a 1e30\n", "line 1: relevance '1e30' is out of reach: at most 1,000,000"),
        ("q1 0 a -99999999999999999999\n", "line 1: relevance '-99999999999999999999' is out of reach"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CorpusError) as caught:
        read_qrels(write(tmp_path, text))
    assert words in str(caught.value)


def test_a_passage_that_is_positive_and_negative_is_positive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {
        "query_id": "q",
        "positive_passages": [{"docid": "a"}],
        "negative_passages": [{"docid": "a"}, {"docid": "b"}],
    }
    assert read_qrels(write(tmp_path, orjson.dumps(row))) == {"q": {"a": 1, "b": 0}}
    assert "1 passage is positive and negative at once, counted as positive; the first: 'a' of query 'q'" in caplog.text

"""Pairs files of every format: which columns, which rows, what is wrong with the others."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.corpus.pairs import Pair, PairColumns, WindowLimits, cut_windows, find_pairs, read_pairs, resolve_columns
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import CorpusError, M3Error, UsageError


def read(
    path: Path | str,
    *,
    query_field: str | None = None,
    passage_field: str | None = None,
    ids: bool = False,
    stdin: bytes | None = None,
    input_format: str = "auto",
) -> tuple[PairColumns, list[Pair]]:
    stream = None if stdin is None else PeekableStream(io.BytesIO(stdin))
    source = find_pairs(str(path), stdin=stream, input_format=input_format)
    columns = resolve_columns(source, query_field=query_field, passage_field=passage_field, ids=ids, stdin=stream)
    return columns, list(read_pairs(source, columns, ids=ids, stdin=stream))


def sides(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.query, pair.passage) for pair in pairs]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tsv_without_header(tmp_path: Path) -> None:
    columns, pairs = read(write(tmp_path / "p.tsv", "a\tb\tx\nc\td\ty\n"))
    assert columns.names == ("query", "passage", "3")
    assert sides(pairs) == [("a", "b"), ("c", "d")]
    assert pairs[1].row == {"query": "c", "passage": "d", "3": "y"}
    assert [pair.number for pair in pairs] == [1, 2]


def test_tsv_with_header_in_any_order(tmp_path: Path) -> None:
    columns, pairs = read(write(tmp_path / "p.tsv", "label\tPassage\tQuery\n1\tb\ta\n"))
    assert (columns.query, columns.passage, columns.header) == ("Query", "Passage", True)
    assert sides(pairs) == [("a", "b")]


def test_tsv_fields_by_number_and_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", "left\tright\tx\na\tb\tc\n")
    assert sides(read(path, query_field="right", passage_field="x")[1]) == [("b", "c")]
    columns, pairs = read(path, query_field="3", passage_field="1")
    assert columns.names == ("passage", "2", "query")
    assert sides(pairs) == [("x", "left"), ("c", "a")]


def test_tsv_has_no_quoting_and_keeps_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", b'"a\tb"\r\n\n\tb\n\t\na\na\tb\tc\n\xff\tb\n \tb\nlast\tone')
    _, pairs = read(path)
    assert [pair.fault for pair in pairs] == [
        *("", "empty query", "empty query", "wrong number of columns", "wrong number of columns"),
        *("invalid UTF-8", "empty query", ""),
    ]
    assert sides(pairs)[0] == ('"a', 'b"')
    assert sides(pairs)[-1] == ("last", "one")
    assert pairs[4].row == {"query": "a", "passage": "b c"}
    assert pairs[3].row == {"query": "a", "passage": ""}


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", '\ufeffquery,passage\n"a, ""b""","c\nd"\n\ne,f\n,f\ne\n')
    _, pairs = read(path)
    assert sides(pairs)[:2] == [('a, "b"', "c\nd"), ("e", "f")]
    assert [pair.fault for pair in pairs] == ["", "", "empty query", "wrong number of columns"]


def test_csv_whose_quote_is_not_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="correct the quoting"):
        read(write(tmp_path / "p.csv", 'a,b\n"c,d\ne,f\n'))


def test_jsonl_rows_and_their_faults(tmp_path: Path) -> None:
    lines = [
        '{"query":"a","passage":"b"}',
        "{",
        '{"query":"a"}',
        '{"query":1,"passage":"b"}',
        '{"query":" ","passage":"b"}',
    ]
    _, pairs = read(write(tmp_path / "p.jsonl", "\n".join(lines)))
    assert [pair.fault for pair in pairs] == [
        *("", "invalid JSON", "no passage", "query is a number, not a string", "empty query"),
    ]
    assert pairs[0].raw == lines[0].encode()


def test_parquet_keeps_its_batches(tmp_path: Path) -> None:
    table = pa.table({"text2": ["b", None], "text1": ["a", "c"], "n": pa.array([1, 2], pa.int8())})
    pq.write_table(table, tmp_path / "p.parquet")
    columns, pairs = read(tmp_path / "p.parquet")
    assert (columns.query, columns.passage) == ("text1", "text2")
    assert [pair.fault for pair in pairs] == ["", "no passage"]
    assert pairs[1].batch[0].schema.field("n").type == pa.int8()


def test_a_run_with_blanks_in_ids_as_search_writes_it(tmp_path: Path) -> None:
    lines = "q 1\tQ0\td  1 \t1\t0.5\ttag\nq2 Q0 d2 1 0.5 tag\n"
    for path in (write(tmp_path / "p.trec", lines), write(tmp_path / "told-by-content", lines)):
        columns, pairs = read(path, ids=True)
        assert columns.names == ("query_id", "Q0", "doc_id", "rank", "score", "tag")
        assert sides(pairs) == [("q 1", "d  1 "), ("q2", "d2")]


def test_trec_run(tmp_path: Path) -> None:
    path = write(tmp_path / "run.txt", "q1 Q0 d1 1 9.5 bm25\nq1\tQ0\td2\t2\t9.1\tbm25\n")
    columns, pairs = read(path, ids=True)
    assert columns.names == ("query_id", "Q0", "doc_id", "rank", "score", "tag")
    assert sides(pairs) == [("q1", "d1"), ("q1", "d2")]


def test_ids_may_be_integers(tmp_path: Path) -> None:
    _, pairs = read(write(tmp_path / "p.jsonl", '{"qid":7,"docid":"d"}\n{"qid":true,"docid":"d"}\n'), ids=True)
    assert sides(pairs)[0] == ("7", "d")
    assert pairs[1].fault == "query is a boolean, not a string"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\tb\n", ("a", "b")),
        (b'query,passage\n"a",b\n', ("a", "b")),
        (b'{"query":"a","passage":"b"}\n', ("a", "b")),
        (gzip.compress(b"a\tb\n", mtime=0), ("a", "b")),
    ],
)
def test_standard_input_of_any_format(content: bytes, expected: tuple[str, str]) -> None:
    assert sides(read("-", stdin=content)[1]) == [expected]


@pytest.mark.parametrize(
    ("content", "name", "kind", "words"),
    [
        ("", "p.tsv", CorpusError, "is empty"),
        ("\n\n", "p.tsv", CorpusError, "only blank lines"),
        ("a b\n", "p.txt", CorpusError, "neither tab nor comma"),
        ("one\n", "p.tsv", CorpusError, "only 1 column;"),
        ('{"x":"a","y":"b"}\n', "p.jsonl", CorpusError, "no column that is known for the query; it has x, y"),
        ("query\tquery\n", "p.tsv", CorpusError, "two columns 'query'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: str, name: str, kind: type[M3Error], words: str) -> None:
    fields = {"query_field": "query", "passage_field": "query"} if "two columns" in words else {}
    with pytest.raises(kind, match=words):
        read(write(tmp_path / name, content), **fields)  # type: ignore[arg-type]


def test_named_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", "query\tpassage\na\tb\n")
    with pytest.raises(CorpusError, match=r"no column 'pasage' \(--passage-field\)"):
        read(path, passage_field="pasage")
    with pytest.raises(UsageError, match="both"):
        read(path, query_field="query", passage_field="query")
    with pytest.raises(CorpusError, match="no such file"):
        read(tmp_path / "none.tsv")
    with pytest.raises(UsageError, match="m3 reads local files; copy it here first"):
        find_pairs("s3://bucket/pairs.tsv")
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)


def make_pairs(texts: list[tuple[str, str]]) -> list[Pair]:
    return [
        Pair(number=number, query=query, passage=passage, fault="", row={}, raw=b"", batch=None)
        for number, (query, passage) in enumerate(texts, start=1)
    ]


def test_windows_count_distinct_texts_once() -> None:
    pairs = make_pairs([("q", f"{number:04}") for number in range(10)])
    sizes = [len(window) for window in cut_windows(pairs, WindowLimits(pairs=99, text_bytes=17, side_bytes=99))]
    assert sizes == [4, 4, 2]
    assert [len(w) for w in cut_windows(pairs, WindowLimits(pairs=3, text_bytes=999, side_bytes=99))] == [3, 3, 3, 1]


def test_windows_end_where_the_lighter_side_is_full() -> None:
    pairs = make_pairs([(f"{number:04}", f"{number:09}") for number in range(5)])
    sizes = [len(window) for window in cut_windows(pairs, WindowLimits(pairs=99, text_bytes=999, side_bytes=8))]
    assert sizes == [2, 2, 1]

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.fields import resolve_fields
from m3cli.corpus.rows import Fault
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import Block, CsvStream
from m3cli.errors import CorpusError
from tests.corpus.test_corpus_reader import list_skipped, list_texts, read_all

cells = st.text(st.sampled_from('a,;"\n\r é\0語'), max_size=6)
tables = st.lists(st.tuples(cells, cells, cells), max_size=12)


def as_csv(rows: list[Any], **how: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **how).writerows(rows)
    return text.getvalue().encode()


def read_blocks(body: bytes, *, most: int = 1 << 20, limit: int | None = None) -> list[Block]:
    return list(CsvStream(io.BytesIO(body), max_row_bytes=most, rows_left=limit).take(1 << 30))


@settings(max_examples=300, deadline=None)
@given(rows=tables, ending=st.sampled_from(["\n", "\r\n", ""]))
def test_records_are_what_the_csv_module_wrote(rows: list[Any], ending: str) -> None:
    how: dict[str, Any] = {"lineterminator": ending, "quoting": csv.QUOTE_ALL} if ending else {}
    body = as_csv([("one", "two", "three"), *rows], **how)
    blocks = read_blocks(body)
    assert b"".join(block.raw for block in blocks) == body
    assert [tuple(block.row.values()) for block in blocks if isinstance(block.row, dict)] == rows
    assert all(body[block.offset :].startswith(block.raw) for block in blocks)


@settings(max_examples=400, deadline=None)
@given(body=st.binary(max_size=120) | st.text('a,"\n\r', max_size=120).map(str.encode), most=st.integers(4, 40))
def test_any_bytes_are_records_or_faults_and_none_is_lost(body: bytes, most: int) -> None:
    blocks = read_blocks(body, most=most)
    assert b"".join(block.raw for block in blocks) == body
    assert [block.offset for block in blocks] == [sum(len(b.raw) for b in blocks[:i]) for i in range(len(blocks))]
    header = next((i for i, block in enumerate(blocks) if block.raw.strip() and block.row is None), len(blocks))
    for block in blocks[header + 1 :]:
        assert block.row is not None or block.part == "rest" or not block.raw.strip(b"\r\n")


def test_a_quote_that_is_never_closed_costs_one_row() -> None:
    body = b'\xef\xbb\xbfid;text\r\n1;"two\r\nlines"\r\n2;"bad " quote"\r\n\r\n3\r\n4;\xe9\r\n5;fine\r\n'
    body += b'6;"open\r\n7;after\r\n'
    blocks = read_blocks(body)
    rows = [block.row if isinstance(block.row, dict) else block.row.reason for block in blocks if block.row is not None]
    assert rows == [
        {"id": "1", "text": "two\r\nlines"},
        "invalid CSV",
        "wrong number of columns",
        "invalid UTF-8",
        {"id": "5", "text": "fine"},
        "invalid CSV",
        {"id": "7", "text": "after"},
    ]
    faults = [block.row.detail for block in blocks if isinstance(block.row, Fault)]
    assert faults == [
        "';' expected after '\"'",
        "it has 1 instead of 2",
        "invalid continuation byte at byte 2 of the row",
        "its quote is not closed",
    ]


def test_a_record_that_is_too_long_is_one_fault_and_the_next_are_read() -> None:
    body = b'a,b\n1,"' + b"x" * 50 + b'"\n2,"' + b"y" * 10 + b"\n" + b"z" * 20 + b'"\n3,c\n'
    rows = [block.row for block in read_blocks(body, most=30) if block.row is not None]
    assert [row if isinstance(row, dict) else row.reason for row in rows] == [
        "row longer than --max-row-bytes",
        "row longer than --max-row-bytes",
        "wrong number of columns",
        {"a": "3", "b": "c"},
    ]


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=12), size=st.integers(5, 60), data=st.data())
def test_shards_partition_the_rows_and_streams_are_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    body = as_csv([("id", "text"), *rows])
    (folder / "a.csv").write_bytes(body)
    (folder / "b.csv.gz").write_bytes(gzip.compress(body))
    whole, cut = read_all([folder / "a.csv"]), read_all([folder / "a.csv"], shard_size=size)
    packed = read_all([folder / "b.csv.gz"], shard_size=size)
    assert [shard.input_hash for shard in cut] == [shard.input_hash for shard in packed]
    assert list_texts(cut) == list_texts(whole) == list_texts(packed)
    assert list_skipped(cut) == list_skipped(whole)
    picked = data.draw(st.sets(st.sampled_from(range(len(cut)))))
    some = read_all([folder / "a.csv"], shard_size=size, ask=lambda s: "read" if s.index in picked else "skip")
    assert [shard.documents if shard.shard.index in picked else () for shard in cut] == [s.documents for s in some]
    limit = data.draw(st.integers(1, len(rows)))
    few = read_all([folder / "a.csv"], shard_size=size, limit=limit)
    assert sum(len(shard.documents) + len(shard.skipped) for shard in few) == min(limit, len(rows))


def test_each_file_has_its_own_order_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"docno,title,body,url\n1,T,one,u1\n")
    (tmp_path / "b.csv").write_bytes(b"body,docno\ntwo,2\n")
    (tmp_path / "empty.csv").write_bytes(b"other\n")
    first, second, _ = read_all([tmp_path / name for name in ("a.csv", "b.csv", "empty.csv")], keep_fields=["url"])
    assert [(d.id, d.text) for s in (first, second) for d in s.documents] == [("1", "T\none"), ("2", "two")]
    assert [shard.kept.to_pylist() for shard in (first, second)] == [[{"url": "u1"}], [{"url": None}]]


def test_standard_input_is_csv_if_it_is_said_so() -> None:
    body = b'id,text\n1,"a, b"\n'
    (shard,) = read_all(["-"], stdin=body, input_format="csv")
    assert list_texts([shard]) == ["a, b"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"12,some words,more\n13,others,yet\n", r"a\.csv has no field that is known for text; it has 12, some words"),
        (b'id,"te"xt\n1,a\n', r"a\.csv: its first row, which should be the header, cannot be read as CSV: invalid CSV"),
        (b"id,text,text\n1,a,b\n", r"a\.csv has 2 columns named 'text': rename"),
        (b"id,text\n", r"a\.csv: nothing to encode, there are no rows"),
    ],
)
def test_a_header_that_does_not_help_is_refused(tmp_path: Path, body: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(body)
    with pytest.raises(CorpusError, match=message):
        resolve_fields(find_sources([str(tmp_path / "a.csv")]))


def test_a_file_without_the_text_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n")
    (tmp_path / "b.csv").write_bytes(b"id,body\n1,a\n")
    with pytest.raises(CorpusError, match=r"b\.csv has no text column 'text'; it has id, body"):
        resolve_fields(find_sources([str(tmp_path)]))

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from m3cli.config import FieldFlags
from m3cli.corpus.fields import kept_schema, resolve_fields
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import CorpusError, UsageError
from m3cli.records import Fields
from tests.corpus.test_corpus_reader import list_texts, read_all


def resolve(*paths: Path, **wanted: Any) -> Fields:
    return resolve_fields(find_sources([str(path) for path in paths]), **wanted)


def resolve_text(body: bytes | str, **wanted: Any) -> Fields:
    data = body.encode() if isinstance(body, str) else body
    stdin = PeekableStream(io.BytesIO(data))
    input_format = "auto" if data.lstrip().startswith(b"{") else "tsv"
    fields = resolve_fields(find_sources(["-"], input_format=input_format, stdin=stdin), stdin=stdin, **wanted)
    assert stdin.read(1 << 24) == data, "nothing of standard input is lost"
    return fields


def triple(fields: Fields) -> tuple[str | None, str | None, str]:
    return fields.id, fields.title, fields.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"_id": "1", "title": "t", "text": "x", "metadata": {}}, ("_id", "title", "text")),
        ({"docid": "1", "title": "t", "text": "x"}, ("docid", "title", "text")),
        ({"id": "1", "contents": "x"}, ("id", None, "contents")),
        ({"query_id": "1", "query": "x", "positive_passages": []}, ("query_id", None, "query")),
        ({"text": {"no": "string"}, "body": "x"}, (None, None, "body")),
        ({"text": None}, (None, None, "text")),
        ({"id": 1, "_id": "a", "content": "x", "text": "y"}, ("_id", None, "text")),
        ({"key": "k", "uuid": "u", "doc_no": "n", "docno": "1", "body": "x"}, ("docno", None, "body")),
        ({"key": "k", "uuid": "u", "doc_no": "n", "body": "x"}, ("doc_no", None, "body")),
        ({"key": "k", "uuid": "u", "body": "x"}, ("uuid", None, "body")),
        ({"key": "k", "body": "x"}, ("key", None, "body")),
        ({"docno": "1", "pid": "2", "body": "x"}, ("pid", None, "body")),
    ],
)
def test_fields_of_known_corpora_are_found(row: dict[str, Any], expected: tuple[str | None, str | None, str]) -> None:
    fields = resolve_text(orjson.dumps(row))
    assert triple(fields) == expected
    assert (fields.kept, fields.columns, fields.header) == ((), (), False)


def test_messages_name_the_flags_of_the_command() -> None:
    flags = FieldFlags(text="--words", id="--key", title="--head", kept="--copy")
    for row, wanted, words in (
        (b'{"a":"x"}', {}, "name it with --words"),
        (b"{", {}, "name its text with --words"),
        (b"a\tb\tc\td\n", {}, "name its number, from 1, with --words"),
        (b'{"text":"x"}', {"text_field": "b"}, "correct --words"),
        (b'{"text":"x"}', {"text_field": ""}, "--words is empty"),
        (b'{"text":"x"}', {"id_field": "b"}, "correct --key"),
        (b'{"text":"x"}', {"title_field": "b"}, "correct --head"),
        (b'{"text":"x"}', {"keep_fields": ["b"]}, "correct --copy"),
        (b'{"text":"x"}', {"keep_fields": [""]}, "--copy: '' is no name"),
    ):
        with pytest.raises((CorpusError, UsageError), match=words) as caught:
            resolve_text(row, flags=flags, **wanted)
        assert "-field" not in str(caught.value)


def test_messages_name_the_flags_of_the_command_for_parquet(tmp_path: Path) -> None:
    flags = FieldFlags(text="--words", id="--key", title="--head")
    pq.write_table(pa.table({"text": ["x"], "id": [1.5], "title": [2.5]}), tmp_path / "c.parquet")
    for wanted, words in (
        ({"id_field": "id", "title_field": ""}, "another column with --key"),
        ({"id_field": "", "title_field": "title"}, "another column with --head"),
        ({"text_field": "id", "id_field": "", "title_field": ""}, "another column with --words"),
    ):
        with pytest.raises(CorpusError, match=words):
            resolve(tmp_path / "c.parquet", flags=flags, **wanted)


def test_named_fields_win_and_empty_means_none() -> None:
    row = b'{"_id":"1","key":"k","title":"t","head":"h","text":"x","main":"m","u":1}'
    named = resolve_text(row, id_field="key", title_field="head", text_field="main", keep_fields=["u"])
    assert triple(named) == ("key", "head", "main")
    assert named.kept == ("u",)
    assert triple(resolve_text(row, id_field="", title_field="")) == (None, None, "text")
    assert triple(resolve_text(row, text_field="title")) == ("_id", None, "title"), "the text is not its own title"


def test_fields_may_be_in_any_of_the_first_rows_and_malformed_ones_are_passed_over() -> None:
    body = b'{"text":"a"\n{"other":1}\n\n[1]\n{"docid":"1","text":"x"}\n'
    assert triple(resolve_text(body)) == ("docid", None, "text")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"text_field": "txt"}, r"stdin: no row has the field 'txt'; the first rows have id, text, x: "
         r"correct --text-field \(did you mean 'text'\?\)"),
        ({"id_field": "zzzz"}, r"no row has the field 'zzzz'.*correct --id-field$"),
        ({"title_field": "title"}, r"no row has the field 'title'.*correct --title-field"),
        ({"keep_fields": ["x", "y"]}, r"no row has the field 'y'.*correct --keep-fields"),
    ],
)  # fmt: skip
def test_named_field_that_is_not_there_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        resolve_text(b'{"id":1,"text":"a","x":2}', **wanted)


def test_no_text_field_is_refused_with_those_that_are_there() -> None:
    body = orjson.dumps({"texte": "a", **{f"f{i}": i for i in range(30)}})
    message = r"stdin has no field that is known for text; it has texte, f0, .*f18 \.\.\.: name it with --text-field"
    with pytest.raises(CorpusError, match=message + r" \(did you mean 'texte'\?\)"):
        resolve_text(body)


def test_only_invalid_rows_need_a_named_text_field() -> None:
    body = b'{"text":\n{\n'
    assert triple(resolve_text(body, text_field="t", id_field="i", title_field="")) == ("i", None, "t")
    with pytest.raises(CorpusError, match=r"stdin: none of the first rows can be read.*invalid JSON \(.*--text-field"):
        resolve_text(body)


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"text":"c"}\n', b"\n{" + b"x" * (1 << 21)])
def test_a_first_row_that_is_a_book_is_looked_at(end: bytes) -> None:
    body = b'{"docid":"1","contents":"' + b"x" * (1 << 21) + b'"}' + end
    assert triple(resolve_text(body)) == ("docid", None, "contents")


@pytest.mark.parametrize("ending", ["stdin", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(b"{\n" * 98 + b'{"x": "' + b"x" * (1 << 21) + b"\n", id="99 that cannot be read, one is long"),
        pytest.param(b" \n" * (1 << 20), id="blank lines"),
        pytest.param(b'{"text": "' + b"x" * (3 << 20) + b'"}\n', id="a row that is too long"),
        pytest.param(b'{"contents":"' + b"x" * (1 << 20) + b'"}\n', id="a long row"),
    ],
)
def test_the_look_goes_on_until_a_row_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, before: bytes
) -> None:
    monkeypatch.setattr("m3cli.corpus.fields.MAX_ROW_BYTES", 3 << 20)
    body = before + b'{"docid":"1","contents":"one"}\n' * 3
    wanted = (None if before.startswith(b'{"contents') else "docid", None, "contents")
    if ending == "stdin":
        if b'"text"' in before:
            return  # no more of standard input is held than the longest row
        stdin = PeekableStream(io.BytesIO(body))
        sources = find_sources(["-"], input_format="jsonl", stdin=stdin)
        assert triple(resolve_fields(sources, stdin=stdin)) == wanted
        assert stdin.read(1 << 24) == body
        return
    packers: dict[str, Any] = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
    (tmp_path / f"a{ending}").write_bytes(packers[ending](body))
    assert triple(resolve(tmp_path)) == wanted


def test_no_more_of_a_pipe_is_read_than_is_needed() -> None:
    body = b'{"docid":"1","contents":"' + b"x" * 200_000 + b'"}\n'
    raw = io.BytesIO(body * 20)
    stdin = PeekableStream(raw)
    assert triple(resolve_fields(find_sources(["-"], stdin=stdin), stdin=stdin)) == ("docid", None, "contents")
    assert raw.tell() == 1 << 20


def test_a_first_row_that_is_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3cli.corpus.fields.MAX_ROW_BYTES", 3 << 20)
    body = b'{"a":"' + b"x" * (3 << 20) + b'","text":"b"}\n'
    assert resolve_text(body, text_field="text").text == "text"
    with pytest.raises(CorpusError, match=r"its first row is longer than 3,145,728 bytes.*--text-field"):
        resolve_text(body)


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(CorpusError, match="stdin: nothing to encode, there are no rows"):
        resolve_text(b" \n\n")


@pytest.mark.parametrize(
    ("body", "expected", "columns", "header"),
    [
        ("1\tone\n", ("1", None, "2"), ("1", "2"), False),
        ("1\tt\tone\r\n", ("1", "2", "3"), ("1", "2", "3"), False),
        ("qid\tquery\n1\tone\n", ("qid", None, "query"), ("qid", "query"), True),
        ("\ufeffid\ttitle\ttext\r\n1\tt\tone\n", ("id", "title", "text"), ("id", "title", "text"), True),
        ("text\tlang\none\ten\n", ("1", None, "2"), ("1", "2"), False),
        ("12\ttext\n", ("1", None, "2"), ("1", "2"), False),
        ("id\ttext\ta sentence, not a name!\n", ("1", "2", "3"), ("1", "2", "3"), False),
    ],
)
def test_tsv_first_line_is_a_header_only_if_it_names_the_fields(
    body: str, expected: tuple[str | None, str | None, str], columns: tuple[str, ...], header: bool
) -> None:
    fields = resolve_text(body)
    assert triple(fields) == expected
    assert (fields.columns, fields.header) == (columns, header)


def test_a_file_without_tabs_is_not_taken_for_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,one\n2,two\n")
    sources = find_sources([str(tmp_path / "a.csv")], input_format="tsv")
    with pytest.raises(
        CorpusError, match=r"a\.csv has no tab in its first rows, the first is 'id,text'.*--input-format"
    ):
        resolve_fields(sources)
    (tmp_path / "a.csv").write_bytes(b"one\n2\ttwo\n")
    assert resolve_fields(sources).text == "1"
    for line in (b"one\n", b"text\n"):
        (tmp_path / "one.tsv").write_bytes(line)
        found = resolve(tmp_path / "one.tsv")
        assert (triple(found), found.columns, found.header) == ((None, None, "1"), ("1",), False)


def test_columns_can_be_named_or_counted() -> None:
    wide = "7\thttp\tt\tone\n"
    with pytest.raises(CorpusError, match=r"stdin has 4 columns and no header.*--text-field"):
        resolve_text(wide)
    assert triple(resolve_text(wide, text_field="4")) == ("1", None, "4")
    assert triple(resolve_text(wide, text_field="4", id_field="2", title_field="3")) == ("2", "3", "4")
    assert triple(resolve_text("a\tb\n", text_field="1")) == (None, None, "1")
    named = resolve_text("nr\tsatz\n1\tone\n", text_field="satz", id_field="nr")
    assert (triple(named), named.header) == (("nr", None, "satz"), True)
    with pytest.raises(CorpusError, match=r"no row has the field 'satz'; the first rows have 1, 2"):
        resolve_text("1\tone\n", text_field="satz")


def test_other_header_in_a_later_tsv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"id\ttext\n1\tone\n")
    (tmp_path / "b.tsv").write_bytes(b"2\ttwo\n")
    with pytest.raises(CorpusError, match=r"b.tsv does not begin with the header of the other TSV files, id, text"):
        resolve(tmp_path)


def test_plain_text_has_nothing_but_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n")
    assert triple(resolve(tmp_path)) == (None, None, "text")
    with pytest.raises(CorpusError, match=r"a.txt: no row has the field 'id'; the first rows have text"):
        resolve(tmp_path, id_field="id")


def write(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


def test_parquet_fields_come_from_the_schema(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", docid=[1], title=["t"], body=["x"], text=[3])
    assert triple(resolve(tmp_path)) == ("docid", "title", "body")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [b"x"]}, r"a.parquet: column 'text' is binary, and strings are needed.*--text-field"),
        ({"text": ["x"], "title": [1]}, r"column 'title' is int64, and strings are needed.*--title-field"),
        ({"text": ["x"], "id": [1.5]}, r"column 'id' is double, and strings or integers are needed.*--id-field"),
    ],
)
def test_parquet_column_of_a_wrong_type_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet", **columns)
    with pytest.raises(CorpusError, match=message):
        resolve(tmp_path)


def test_later_file_must_have_the_text_field_too(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=["x"])
    write(tmp_path / "b.parquet", body=["x"])
    with pytest.raises(CorpusError, match=r"b.parquet has no text column 'text'; it has body"):
        resolve(tmp_path)
    write(tmp_path / "b.parquet", text=[1])
    with pytest.raises(CorpusError, match=r"b.parquet: column 'text' is int64"):
        resolve(tmp_path)
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "c.jsonl").write_bytes(b'{"body":"x"}\n')
    with pytest.raises(CorpusError, match=r"c.jsonl: no row has the field 'text'"):
        resolve(tmp_path)


def test_kept_fields_must_not_clash_or_repeat() -> None:
    row = b'{"text":"x","id":"1","a":1}'
    with pytest.raises(UsageError, match=r"'id' clashes with a column that m3 writes"):
        resolve_text(row, keep_fields=["a", "id"], reserved=frozenset({"id"}))
    with pytest.raises(UsageError, match=r"'a' is named twice"):
        resolve_text(row, keep_fields=["a", "a"])
    with pytest.raises(UsageError, match=r"'' is no name"):
        resolve_text(row, keep_fields=[""])
    with pytest.raises(UsageError, match=r"--text-field is empty"):
        resolve_text(row, text_field="")


def kept(folder: Path, *names: str) -> pa.Schema:
    sources = find_sources([str(folder)])
    return kept_schema(sources, resolve_fields(sources, keep_fields=names))


def test_kept_types_are_those_of_parquet_and_strings_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=["x"], n=pa.array([1], pa.int16()), s=["s"], only=[True])
    write(tmp_path / "b.parquet", text=["x"], n=pa.array([1], pa.int16()), s=pa.array(["s"], pa.large_string()))
    assert kept(tmp_path, "s", "n", "only") == pa.schema([("s", pa.string()), ("n", pa.int16()), ("only", pa.bool_())])
    (tmp_path / "c.jsonl").write_bytes(b'{"text":"x","s":1}\n')
    assert kept(tmp_path, "s") == pa.schema([("s", pa.string())])
    with pytest.raises(
        CorpusError, match=r"kept field 'n' is int16 in a.parquet and string in c.jsonl: convert one of them"
    ):
        kept(tmp_path, "n")
    assert kept(tmp_path) == pa.schema([])


NESTED = [
    {"doc": {"text": "one", "lang": {"code": "en", "score": 1.50}}, "meta": {"id": 12345678901234567890123}},
    {"doc": {"text": "two"}, "meta": None},
    {"doc": {"text": None}, "meta": {"id": "c"}},
    {"doc": "no object"},
    {"doc.text": "exact", "doc": {"text": "nested"}, "meta": {"id": 4}},
]
DOTTED: dict[str, Any] = {"text_field": "doc.text", "id_field": "meta.id", "keep_fields": ["doc.lang", "doc.lang.code"]}


def test_a_dotted_name_is_a_field_inside_an_object_unless_a_field_has_that_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NESTED), encoding="utf-8")
    (shard,) = read_all([tmp_path / "a.jsonl"], **DOTTED)
    found = [(d.id.partition(":")[0], d.text) for d in shard.documents]
    assert found == [("12345678901234567890123", "one"), ("a.jsonl", "two"), ("4", "exact")]
    assert shard.kept.to_pylist()[0] == {"doc.lang": '{"code": "en", "score": 1.5}', "doc.lang.code": "en"}
    assert [(row.reason, row.id) for row in shard.skipped] == [("no text field", "c"), ("no text field", None)]
    with pytest.raises(
        CorpusError, match=r"first rows have doc, meta, doc\.text, doc\.lang, .*did you mean 'doc\.text'"
    ):
        resolve(tmp_path / "a.jsonl", text_field="doc.txt")


def test_a_dotted_name_is_a_field_of_a_struct_of_parquet(tmp_path: Path) -> None:
    rows = [
        {"doc": {"text": "one", "n": 1}, "meta": {"id": 7}},
        {"doc": None, "meta": {"id": 8}},
        {"doc": {"text": "x"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    found = read_all([tmp_path / "a.parquet"], text_field="doc.text", id_field="meta.id", keep_fields=["doc.n"])
    assert [(d.id, d.text) for s in found for d in s.documents] == [("7", "one"), ("a.parquet:2", "x")]
    assert [row.reason for shard in found for row in shard.skipped] == ["text is not a string"]
    assert found[0].kept.to_pylist() == [{"doc.n": 1}]
    table = pa.table({"doc.text": ["exact"], "doc": [{"text": "nested"}]})
    pq.write_table(table, tmp_path / "b.parquet")
    assert list_texts(read_all([tmp_path / "b.parquet"], text_field="doc.text")) == ["exact"]

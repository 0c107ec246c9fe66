from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from m3cli.corpus.fields import kept_schema, resolve_fields
from m3cli.corpus.plan import Plan, plan_shards
from m3cli.corpus.reader import Action, read_shards
from m3cli.corpus.rows import find_members
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import CorpusError
from m3cli.records import Shard, ShardText

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(
    inputs: Sequence[Path | str],
    *,
    shard_size: int = 1 << 20,
    limit: int | None = None,
    max_row_bytes: int = 1 << 20,
    ask: Callable[[Shard], Action] = lambda shard: "read",
    stdin: bytes | None = None,
    input_format: str = "auto",
    **wanted: Any,
) -> list[ShardText]:
    stream = None if stdin is None else PeekableStream(io.BytesIO(stdin))
    sources = find_sources([str(path) for path in inputs], stdin=stream, input_format=input_format)
    fields = resolve_fields(sources, stdin=stream, **wanted)
    plan = plan_shards(sources, fields=fields, shard_size=shard_size, limit=limit, max_row_bytes=max_row_bytes)
    schema = kept_schema(sources, fields)
    asked: list[Shard] = []

    def note(shard: Shard) -> Action:
        asked.append(shard)
        return ask(shard)

    reading = read_shards(
        sources, plan=plan, fields=fields, schema=schema, max_row_bytes=max_row_bytes, ask=note, stdin=stream
    )

    def gather() -> Iterator[ShardText]:
        assert (yield from reading) == len(asked)

    texts = list(gather())
    assert [shard.index for shard in asked] == list(range(len(asked)))
    if plan.complete:
        assert tuple(asked) == plan.shards
    return texts


def list_texts(shards: Sequence[ShardText]) -> list[str]:
    return [document.text for shard in shards for document in shard.documents]


def list_skipped(shards: Sequence[ShardText]) -> list[tuple[int, str]]:
    return [(row.position, row.reason) for shard in shards for row in shard.skipped]


def as_jsonl(rows: Sequence[Any]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def test_beir_row_is_title_newline_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(as_jsonl([{"_id": "a", "title": "T", "text": "x y"}, {"_id": "b", "title": " ", "text": "z"}]))
    (shard,) = read_all([path])
    assert [(d.id, d.text, d.has_own_id) for d in shard.documents] == [("a", "T\nx y", True), ("b", "z", True)]
    assert shard.kept is None
    assert shard.skipped == ()


def test_text_hash_is_xxh3_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"hello\n")
    (shard,) = read_all([path])
    # xxhsum -H2 of "hello": b5e9c1ad071b3e7fc779cfaa5e523818
    assert shard.documents[0].text_hash == (0xB5E9C1AD071B3E7F, 0xC779CFAA5E523818)


def test_missing_ids_are_source_and_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":7,"text":"a"}\n\n{"text":"b"}\n{"id":null,"text":"c"}\n{"id":"","text":"d"}')
    (shard,) = read_all([path])
    assert [d.id for d in shard.documents] == ["7", "a.jsonl:21", "a.jsonl:34", "a.jsonl:57"]
    assert [d.has_own_id for d in shard.documents] == [True, False, False, False]


def test_integer_id_is_written_in_full_however_large(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":123456789012345678901234567890,"text":"a"}\n{"id":-3,"text":"a"}\n')
    (shard,) = read_all([path])
    assert [d.id for d in shard.documents] == ["123456789012345678901234567890", "-3"]


@pytest.mark.parametrize(
    ("row", "reason", "own_id"),
    [
        (b'{"id":"r","text":', "invalid JSON", None),
        (b'{"id":"r","text":NaN}', "invalid JSON", None),
        (b"[" * 5000, "invalid JSON", None),
        (b'{"id":"r","text":"\xff"}', "invalid UTF-8", None),
        (b'{"id":"r","text":"a\\ud800b"}', "lone surrogate", None),
        (b'{"id":"r","text":"\\uDC00"}', "lone surrogate", None),
        (b'{"text":"\\ud800', "invalid JSON", None),
        (b'["r"]', "not a JSON object", None),
        (b"null", "not a JSON object", None),
        (b'{"id":"r"}', "no text field", "r"),
        (b'{"id":5,"title":"t"}', "no text field", "5"),
        (b'{"id":"r","text":null}', "text is not a string", "r"),
        (b'{"id":"r","text":3}', "text is not a string", "r"),
        (b'{"id":"r","text":["a"]}', "text is not a string", "r"),
        (b'{"id":"r","text":"","title":" \\u3000"}', "empty text", "r"),
        (b'{"id":"r","text":"x","title":1}', "title is not a string", "r"),
        (b'{"id":1.5,"text":"x"}', "id is not a string or integer", None),
        (b'{"id":true,"text":"x"}', "id is not a string or integer", None),
        (b'{"id":"r","text":"' + b"x" * 6000 + b'"}', "row longer than --max-row-bytes", None),
    ],
)
def test_bad_row_is_skipped_with_its_reason(tmp_path: Path, row: bytes, reason: str, own_id: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id":"1","title":"","text":"one"}\n' + row + b'\n{"id":"3","text":"three"}\n')
    (shard,) = read_all([path], max_row_bytes=5500)
    assert list_texts([shard]) == ["one", "three"]
    (skipped,) = shard.skipped
    assert (skipped.source, skipped.position, skipped.byte_offset) == ("a.jsonl", 35, 35)
    assert (skipped.reason, skipped.id, skipped.row) == (reason, own_id, row)


def test_title_alone_and_nul_and_pairs_of_surrogates_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"title":"T","text":" "}\n{"text":"a\\u0000b"}\n{"text":"\\ud83d\\ude00"}\n')
    assert list_texts(read_all([path])) == ["T", "a\0b", "\U0001f600"]


def test_bom_carriage_returns_blank_lines_and_a_last_line_without_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n \t\r\n\ntwo\rx\r\nthree")
    (shard,) = read_all([path])
    assert list_texts([shard]) == ["one", "two\rx", "three"]
    assert [d.id for d in shard.documents] == ["a.txt:0", "a.txt:13", "a.txt:20"]


def test_tsv_header_is_no_row_and_wrong_columns_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'id\ttitle\ttext\n1\tT\t"x"\r\n2\tT\n3\tT\ta\tb\n4\t\t\xff\n')
    (shard,) = read_all([path])
    assert [(d.id, d.text) for d in shard.documents] == [("1", 'T\n"x"')]
    assert list_skipped([shard]) == [
        (23, "wrong number of columns"),
        (27, "wrong number of columns"),
        (35, "invalid UTF-8"),
    ]


def test_headers_of_all_tsv_files_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"id\ttext\n1\tone\n")
    (tmp_path / "b.tsv").write_bytes(b"id\ttext\n2\ttwo\n")
    assert list_texts(read_all([tmp_path])) == ["one", "two"]
    assert list_texts(read_all([tmp_path], limit=2)) == ["one", "two"]


def test_kept_fields_of_lines_are_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text":"a","u":"s","n":1}\n{"text":"b","u":{"x":[1,null]},"n":1.0}\n{"text":""}\n{"text":"c","u":null}\n'
        b'{"text":"d","u":true,"n":99999999999999999999}\n'
    )
    (shard,) = read_all([path], keep_fields=["u", "n"])
    assert shard.kept.schema == pa.schema([("u", pa.string()), ("n", pa.string())])
    assert shard.kept.to_pylist() == [
        {"u": "s", "n": "1"},
        {"u": '{"x":[1,null]}', "n": "1.0"},
        {"u": None, "n": None},
        {"u": "true", "n": "99999999999999999999"},
    ]


@pytest.mark.parametrize(
    "value",
    [
        *("123456789012345678901234567890", "0.12345678901234567890123", "1e2", "1.10", "-0", "0", "-0.0", "1E+2"),
        *(
            '{"a":123456789012345678901234567890}',
            '{ "a" : 1.10,\t"a": [1e2, "}\\\\", "\\"]"] }',
            "[ ]",
            "true",
            "false",
        ),
        *('[18446744073709551616, "\\u00e9\\n", {"k": -0}]', '{"k": {"k": [null, "k"]}}', "[" * 999 + "]" * 999),
    ],
)
@pytest.mark.parametrize(
    "line",
    [
        '{"k":%s,"text":"a"}',
        '{"text":"a", "k" : %s }',
        ' {"x":{"k":[1,2]},"k":7,"text":"{\\"k\\":1,}", "": 3, "\\u006b":\t%s\t, "z":["k",{"k":2}]}\r',
    ],
)
def test_kept_value_that_is_not_a_string_is_as_it_is_in_the_row(tmp_path: Path, line: str, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((line % value).encode() + b"\n")
    (shard,) = read_all([path], keep_fields=["k"])
    assert shard.kept.to_pylist() == [{"k": value}]


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('a\\"{}[],: é'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\,:{}'), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(
    row=st.dictionaries(st.text('ab"\\,:{}', min_size=1), _json, max_size=5),
    spaced=st.booleans(),
    escaped=st.booleans(),
)
def test_members_are_found_as_they_are_written(row: dict[str, Any], spaced: bool, escaped: bool) -> None:
    how: dict[str, Any] = {"ensure_ascii": escaped, "separators": (" , ", " : ") if spaced else (",", ":")}
    line = json.dumps(row, **how).encode()
    expected = {name: json.dumps(value, **how) for name, value in row.items()}
    assert dict(find_members(line)) == expected


def test_long_row_is_passed_over_and_its_head_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bomb = b'{"text":"' + b"x" * (5 << 20) + b'"}'
    path.write_bytes(b'{"text":"a"}\n' + bomb + b'\n{"text":"b"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        shards = read_all([tmp_path / name], max_row_bytes=100_000, shard_size=1 << 20)
        assert len(shards) == 6
        assert [len(shard.documents) for shard in shards] == [1, 0, 0, 0, 0, 1]
        assert list_skipped(shards) == [(13, "row longer than --max-row-bytes")]
        assert shards[0].skipped[0].row == bomb[: 64 << 10]
        hashed = read_all([tmp_path / name], max_row_bytes=100_000, shard_size=1 << 20, ask=lambda shard: "hash")
        assert [shard.input_hash for shard in hashed] == [shard.input_hash for shard in shards]


words = st.text(st.sampled_from("ab é😀"), max_size=30)
bodies = st.lists(
    st.one_of(
        words.map(lambda text: orjson.dumps({"id": text, "text": text})),
        st.sampled_from([b"", b"  ", b"{", b'{"text":1}', b'{"text":"\xff"}', b"x" * 70, b" " * 70, b"\r"]),
    ),
    min_size=1,
    max_size=30,
)
endings = st.sampled_from([b"", b"\n", b"\n\n"])
sizes = st.integers(1, 200)


@quick
@given(lines=bodies, ending=endings, bom=st.booleans(), size=sizes, limit=st.none() | st.integers(1, 40))
def test_plain_gz_zst_and_stdin_give_the_same(
    tmp_path: Path, lines: list[bytes], ending: bytes, bom: bool, size: int, limit: int | None
) -> None:
    body = b"\xef\xbb\xbf" * bom + b'{"id":"","text":"first"}\n' + b"\n".join(lines) + ending
    half = len(body) // 2
    plain, gz, zst = (tmp_path / name for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"))
    plain.write_bytes(body)
    gz.write_bytes(gzip.compress(body[:half]) + gzip.compress(body[half:]))
    zst.write_bytes(zstandard.compress(body[:half]) + zstandard.compress(body[half:]))
    how: dict[str, Any] = {"shard_size": size, "max_row_bytes": 64, "limit": limit}

    def show(shards: Sequence[ShardText]) -> list[Any]:
        return [
            (
                shard.input_hash,
                [(d.text, d.text_hash, d.has_own_id, d.id.rpartition(":")[2]) for d in shard.documents],
                [(s.position, s.reason, s.row) for s in shard.skipped],
            )
            for shard in shards
        ]

    expected = show(read_all([plain], **how))
    assert show(read_all([gz], **how)) == expected
    assert show(read_all([zst], **how)) == expected
    assert show(read_all(["-"], stdin=body, **how)) == expected
    hashes = [shard[0] for shard in expected]
    for path in (plain, gz):
        assert [s.input_hash for s in read_all([path], ask=lambda shard: "hash", **how)] == hashes
    assert [s.input_hash for s in read_all([zst], ask=lambda shard: "skip", **how)] == hashes


@quick
@given(lines=bodies, ending=endings, size=sizes)
def test_shards_partition_the_rows(tmp_path: Path, lines: list[bytes], ending: bytes, size: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text":"first"}\n' + b"\n".join(lines) + ending)
    cut, whole = read_all([path], shard_size=size), read_all([path], shard_size=1 << 20)
    assert len(cut) == -(-path.stat().st_size // size)
    assert [d for shard in cut for d in shard.documents] == list(whole[0].documents)
    assert [s for shard in cut for s in shard.skipped] == list(whole[0].skipped)
    assert all(shard.shard.start <= s.position < shard.shard.stop for shard in cut for s in shard.skipped)


@quick
@given(lines=bodies, size=sizes, picks=st.lists(st.sampled_from(["read", "hash", "skip"]), min_size=1, max_size=20))
def test_a_shard_does_not_depend_on_what_was_done_with_the_others(
    tmp_path: Path, lines: list[bytes], size: int, picks: list[Action]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text":"first"}\n' + b"\n".join(lines))
    whole = {shard.shard.index: shard for shard in read_all([path], shard_size=size)}
    some = read_all([path], shard_size=size, ask=lambda shard: picks[shard.index % len(picks)])
    for shard in some:
        assert shard.input_hash == whole[shard.shard.index].input_hash
        if picks[shard.shard.index % len(picks)] == "read":
            assert shard == whole[shard.shard.index]
    assert [s.shard.index for s in some] == [i for i in whole if picks[i % len(picks)] != "skip"]


@quick
@given(lines=bodies, size=sizes, limit=st.integers(1, 40))
def test_limit_gives_exactly_the_first_rows_over_all_sources(
    tmp_path: Path, lines: list[bytes], size: int, limit: int
) -> None:
    body = b'{"text":"first"}\n' + b"\n".join(lines) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(body)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(body))
    (tmp_path / "c.jsonl").write_bytes(body)

    def rows(shards: Sequence[ShardText]) -> list[tuple[str, int]]:
        found = [(s.source, s.position) for shard in shards for s in shard.skipped]
        for shard in shards:
            found += [tuple(d.id.rsplit(":", 1)) for d in shard.documents]  # type: ignore[misc]
        return sorted((name, int(position)) for name, position in found)

    everything = rows(read_all([tmp_path], shard_size=1 << 20, id_field=""))
    assert rows(read_all([tmp_path], shard_size=size, limit=limit, id_field="")) == everything[:limit]


def test_shard_numbers_follow_on_after_a_source_that_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"1234\n1234\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"1234\n1234\n"))
    (tmp_path / "c.txt").write_bytes(b"1234\n")
    asked: list[tuple[int, int, int]] = []

    def ask(shard: Shard) -> Action:
        asked.append((shard.source, shard.index, shard.start))
        return "skip"

    shards = read_all([tmp_path], shard_size=5, ask=ask)
    assert asked == [(0, 0, 0), (0, 1, 5), (1, 2, 0), (1, 3, 5), (2, 4, 0)]
    assert [shard.shard.index for shard in shards] == [2, 3], "a stream is hashed where a file is sought past"


def replace_file(path: Path) -> None:
    """Put another file of equal size and date in its place."""
    status, other = path.stat(), path.with_name("other")
    other.write_bytes(b"5678\n5678\n")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def test_skipped_shards_of_a_plain_file_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"1234\n1234\n")
    sources, plan = prepare(path, shard_size=5)
    monkeypatch.setattr("m3cli.corpus.reader.ByteStream", None)
    fields = resolve_fields(sources)
    assert list(read_shards(sources, plan=plan, fields=fields, schema=None, ask=lambda shard: "skip")) == []


def prepare(path: Path, *, shard_size: int) -> tuple[Any, Plan]:
    sources = find_sources([str(path)])
    return sources, plan_shards(sources, fields=resolve_fields(sources), shard_size=shard_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "a.txt is missing: put it back"),
        (lambda path: path.write_bytes(b"1234\n"), "a.txt changed while it was read: it had 10 bytes and has 5 now"),
        (lambda path: path.write_bytes(b"1234\n" * 3), "a.txt changed while it was read"),
        (lambda path: path.write_bytes(b"5678\n5678\n"), "a.txt changed while it was read: it was written to or rep"),
        (replace_file, "a.txt changed while it was read: it was written to or replaced"),
    ],
)
def test_file_that_changes_in_mid_run_is_named(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"1234\n1234\n")
    sources, plan = prepare(path, shard_size=5)
    reading = read_shards(sources, plan=plan, fields=resolve_fields(sources), schema=None, ask=lambda shard: "read")
    assert list_texts([next(reading)]) == ["1234"]
    change(path)
    with pytest.raises(CorpusError, match=message):
        next(reading)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_cut_off_or_damaged_stream_gives_what_came_before_and_its_name(tmp_path: Path, ending: str) -> None:
    body = b"".join(
        b'{"text":"%d %s"}\n' % (i, (i * 7919**40).to_bytes(70, "big").hex().encode()) for i in range(40000)
    )
    packed = gzip.compress(body) if ending == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(body)
    assert len(packed) > 2 << 20
    flipped = bytearray(packed)
    flipped[-3 if ending == ".gz" else -2] ^= 1
    broken = {"ends in the middle of its": packed[:-1], "is corrupt": bytes(flipped)}
    for message, data in broken.items():
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(data)
        sources, plan = prepare(path, shard_size=1 << 20)
        reading = read_shards(sources, plan=plan, fields=resolve_fields(sources), schema=None, ask=lambda shard: "read")
        assert list_texts([next(reading)])[0].startswith("0 ")
        with pytest.raises(CorpusError, match=f"a.jsonl{ending} {message}.*again"):
            list(reading)


def write_table(path: Path, table: pa.Table, rows: int) -> Path:
    """Write Parquet, Feather or, as datasets does, an Arrow stream, with so many rows in a group or batch."""
    if path.suffix == ".parquet":
        return write_parquet(path, table, row_group_size=rows)
    if path.suffix == ".feather":
        feather.write_feather(table, path, chunksize=rows)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_parquet(path: Path, table: pa.Table, **how: Any) -> Path:
    pq.write_table(table, path, **how)
    return path


KINDS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != pa.string_view()])  # pyarrow 23 crashes writing it
@pytest.mark.parametrize("ending", ["feather", "arrow"])
def test_text_of_arrow_may_be_any_string_type(tmp_path: Path, kind: pa.DataType, ending: str) -> None:
    texts = pa.array(["a", None, "", "b", "a"]).cast(kind)
    ids = pa.array([1, 2, 3, None, 5], pa.uint64())
    table = pa.table({"docid": ids, "doc": pa.StructArray.from_arrays([texts], ["t"]), "unread": ids})
    path = write_table(tmp_path / f"a.{ending}", table, 3)
    (shard,) = read_all([path], text_field="doc.t", keep_fields=["docid"])
    assert [(d.id, d.text) for d in shard.documents] == [("1", "a"), (f"{path.name}:3", "b"), ("5", "a")]
    assert list_skipped([shard]) == [(1, "text is not a string"), (2, "empty text")]
    assert shard.kept.column("docid").to_pylist() == [1, None, 5]
    same = read_all([write_table(tmp_path / "b.parquet", table, 9)], text_field="doc.t", keep_fields=["docid"])
    assert [s.input_hash for s in same] == [shard.input_hash]


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_text_may_be_any_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    texts: Any = ["a", None, "", "b", "a"]
    texts = pa.array(texts, kind) if kind == pa.string_view() else pa.array(texts).cast(kind)
    table = pa.table({"docid": pa.array([1, 2, 3, None, 5], pa.uint64()), "text": texts, "k": texts})
    try:
        path = write_parquet(tmp_path / "a.parquet", table, row_group_size=3)
    except pa.ArrowNotImplementedError:
        pytest.skip(f"pyarrow {pa.__version__} does not write {kind} as Parquet")
    shards = read_all([path], keep_fields=["k"])
    assert [[(d.id, d.text) for d in shard.documents] for shard in shards] == [
        [("1", "a")],
        [("a.parquet:3", "b"), ("5", "a")],
    ]
    assert list_skipped(shards) == [(1, "text is not a string"), (2, "empty text")]
    assert [shard.kept.column("k").to_pylist() for shard in shards] == [["a"], ["b", "a"]]
    assert shards[0].kept.schema == pa.schema([("k", pa.large_string() if kind == pa.string_view() else kind)])
    assert shards[0].skipped[0].row == b'{"docid":2,"text":null}'
    assert shards[0].skipped[0].byte_offset is None
    assert shards[0].skipped[0].id == "2"


def test_parquet_kept_columns_keep_type_and_order(tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": pa.array([1, None, 3], pa.int16()),
            "text": ["a", "", "c"],
            "l": pa.array([[1.0], None, [2.0, None]], pa.list_(pa.float32())),
            "t": pa.array([0, 1, None], pa.timestamp("us", "UTC")),
        }
    )
    path = write_parquet(tmp_path / "a.parquet", table)
    (shard,) = read_all([path], keep_fields=["t", "l", "n"])
    assert shard.kept.schema == pa.schema([table.schema.field(name) for name in ("t", "l", "n")])
    assert shard.kept.to_pylist() == table.select(["t", "l", "n"]).take([0, 2]).to_pylist()
    (hashed,) = read_all([path], keep_fields=["t", "l", "n"], ask=lambda shard: "hash")
    assert hashed.input_hash == shard.input_hash
    assert hashed.kept.num_rows == 0
    assert hashed.kept.schema == shard.kept.schema


def test_parquet_row_that_is_no_utf8_or_too_long_is_skipped(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"a\xff", b"x" * 50, b"fine"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": texts}))
    (shard,) = read_all([path], max_row_bytes=40)
    assert list_texts([shard]) == ["ok", "fine"]
    assert [(s.position, s.reason, s.row) for s in shard.skipped] == [
        (1, "invalid UTF-8", b"a\xff"),
        (2, "row longer than --max-row-bytes", b"x" * 50),
    ]


@pytest.mark.parametrize("ending", ["parquet", "feather", "arrow"])
@quick
@given(
    texts=st.lists(st.none() | words, min_size=1, max_size=40),
    groups=st.integers(1, 50),
    size=sizes,
    picks=st.lists(st.sampled_from(["read", "hash", "skip"]), min_size=1, max_size=20),
    limit=st.none() | st.integers(1, 40),
)
def test_shards_of_columns_partition_the_rows(
    tmp_path: Path, ending: str, texts: list[str | None], groups: int, size: int, picks: list[Action], limit: int | None
) -> None:
    table = pa.table({"text": pa.array(texts, pa.string()), "n": range(len(texts))})
    path = write_table(tmp_path / f"a.{ending}", table, groups)
    how: dict[str, Any] = {"keep_fields": ["n"], "limit": limit, "shard_size": size}
    shards = read_all([path], **how)
    wanted = texts[:limit]
    assert list_texts(shards) == [text for text in wanted if text and not text.isspace()]
    assert sum(len(shard.documents) + len(shard.skipped) for shard in shards) == len(wanted)
    for shard in shards:
        assert [f"{path.name}:{n}" for n in shard.kept.column("n").to_pylist()] == [d.id for d in shard.documents]
    some = read_all([path], ask=lambda shard: picks[shard.index % len(picks)], **how)
    for shard in some:
        assert shard.input_hash == shards[shard.shard.index].input_hash
        if picks[shard.shard.index % len(picks)] == "read":
            assert shard == shards[shard.shard.index]


def test_parquet_row_group_is_decoded_once_however_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": ["x" * 100 + str(i) for i in range(100)]}))
    calls: list[Any] = []
    plain = pq.ParquetFile.iter_batches

    def count(self: Any, **how: Any) -> Any:
        calls.append(how["row_groups"])
        return plain(self, **how)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    assert len(read_all([path], shard_size=1000)) > 10
    assert calls == [[0]]


def test_parquet_row_group_is_never_held_whole(tmp_path: Path) -> None:
    texts = [os.urandom(1000).hex() for _ in range(20_000)]
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": texts}), compression="none", use_dictionary=False)
    del texts
    before = pa.total_allocated_bytes()
    held: list[int] = []

    def ask(shard: Shard) -> Action:
        held.append(pa.total_allocated_bytes() - before)
        return "hash"

    assert len(read_all([path], shard_size=1 << 20, ask=ask)) == 39
    assert max(held) < 16 << 20


def test_parquet_hash_depends_on_values_and_nulls_only(tmp_path: Path) -> None:
    def digest(values: list[str | None], **how: Any) -> str:
        path = write_parquet(tmp_path / "a.parquet", pa.table({"text": pa.array(values, pa.string())}), **how)
        return read_all([path], ask=lambda shard: "hash")[0].input_hash

    assert digest(["a", "bc"]) == digest(["a", "bc"], compression="zstd", use_dictionary=False)
    assert len({digest(["a", "bc"]), digest(["ab", "c"]), digest(["abc", ""]), digest(["abc", None])}) == 4


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": [str(i) * 50 for i in range(1000)]}))
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a.parquet (is corrupt|cannot be read).*"):
        read_all([path])
    path.write_bytes(data[:-20])
    with pytest.raises(CorpusError, match=r"a.parquet is corrupt, or not Parquet"):
        read_all([path])


@pytest.mark.parametrize("ending", ["feather", "arrow"])
@quick
@given(cut=st.floats(0, 1), changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))))
def test_damaged_arrow_is_named_or_does_no_harm(
    tmp_path: Path, ending: str, cut: float, changes: list[tuple[float, int]]
) -> None:
    table = pa.table({"id": [str(n) for n in range(50)], "doc": [{"text": f"text {n}"} for n in range(50)]})
    data = bytearray(write_table(tmp_path / f"a.{ending}", table, 20).read_bytes())
    for where, byte in changes:
        data[int(where * len(data))] = byte
    if not changes:
        del data[int(cut * len(data)) :]
    path = tmp_path / f"b.{ending}"
    path.write_bytes(data)
    try:
        read_all([path], text_field="doc.text", shard_size=200)
    except CorpusError as error:
        assert path.name in str(error)  # noqa: PT017


def test_mixed_formats_are_read_as_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"id": "1", "text": "one", "k": 5}]))
    (tmp_path / "b.txt").write_bytes(b"two\n")
    (tmp_path / "c.tsv").write_bytes(b"id\ttext\n3\tthree\n")
    write_parquet(tmp_path / "d.parquet", pa.table({"text": ["four"], "k": pa.array(["s"], pa.large_string())}))
    shards = read_all([tmp_path], keep_fields=["k"])
    assert [(d.id, d.text) for shard in shards for d in shard.documents] == [
        ("1", "one"),
        ("b.txt:0", "two"),
        ("3", "three"),
        ("d.parquet:0", "four"),
    ]
    assert [shard.kept.to_pylist() for shard in shards] == [[{"k": "5"}], [{"k": None}], [{"k": None}], [{"k": "s"}]]
    assert {shard.kept.schema for shard in shards} == {pa.schema([("k", pa.string())])}

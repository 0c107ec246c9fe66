"""What stands in the README's table of bad input: each row is in the output or in `_m3/skipped/`, with a reason."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.conftest import Completed

M3 = Callable[..., Completed]
DEEP = 10_000


@dataclass(frozen=True, kw_only=True)
class Bad:
    line: bytes
    reason: str | None
    "None: it is encoded"
    id: str | None = None
    text: str | None = None
    "what is encoded, where it is"


def _row(**members: Any) -> bytes:
    return json.dumps(members, ensure_ascii=False).encode()


BAD = {
    "invalid JSON": Bad(line=b'{"id": "x", "text": "no end', reason="invalid JSON"),
    "two objects on a line": Bad(line=b'{"id": "x", "text": "a"} {"text": "b"}', reason="invalid JSON"),
    "not an object": Bad(line=b'["a", "list"]', reason="not a JSON object"),
    "invalid UTF-8": Bad(line=b'{"id": "x", "text": "\xff\xfe caf\xe9"}', reason="invalid UTF-8"),
    "lone surrogate": Bad(line=b'{"id": "x", "text": "half \\ud83d a smile"}', reason="lone surrogate"),
    "NaN": Bad(line=b'{"id": "x", "text": "a", "weight": NaN}', reason="invalid JSON"),
    "no text": Bad(line=_row(id="x", body="elsewhere"), reason="no text field", id="x"),
    "null text": Bad(line=_row(id="x", text=None), reason="text is not a string", id="x"),
    "number as text": Bad(line=_row(id="x", text=42), reason="text is not a string", id="x"),
    "list as text": Bad(line=_row(id="x", text=["a", "b"]), reason="text is not a string", id="x"),
    "object as id": Bad(line=_row(id={"n": 1}, text="a"), reason="id is not a string or integer"),
    "empty text": Bad(line=_row(id="x", text=""), reason="empty text", id="x"),
    "whitespace": Bad(line=_row(id="x", text=" \t\n\u3000\u2003"), reason="empty text", id="x"),
    "nested 10,000 deep": Bad(
        line=b'{"id": "x", "text": "a", "meta": ' + b"[" * DEEP + b"]" * DEEP + b"}", reason="invalid JSON"
    ),
    "nested 1,000 deep": Bad(
        line=b'{"id": "deep", "text": "deep enough", "meta": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        reason=None,
        id="deep",
        text="deep enough",
    ),
    "nested 1,022 deep with a large id": Bad(
        line=b'{"id": 99999999999999999999, "text": "x", "x": ' + b"[" * 1022 + b"]" * 1022 + b"}",
        reason=None,
        id="99999999999999999999",
    ),
    "nested too deep with a large id": Bad(
        line=b'{"id": 99999999999999999999, "text": "x", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        reason="invalid JSON",
    ),
    "id of 300 digits": Bad(line=b'{"id": ' + b"9" * 300 + b', "text": "x"}', reason=None, id="9" * 300),
    "large number as text": Bad(
        line=b'{"id": "x", "text": ' + b"9" * 5000 + b', "meta": ' + b"9" * 5000 + b"}",
        reason="invalid JSON",
    ),
    "NUL in the text": Bad(line=_row(id="nul", text="a\0b"), reason=None, id="nul", text="a\0b"),
    "NUL in the line": Bad(line=b'{"id": "x", "text": "a\0b"}', reason="invalid JSON"),
    "CRLF": Bad(line=_row(id="crlf", text="windows line") + b"\r", reason=None, id="crlf", text="windows line"),
    "escaped pair": Bad(
        line=b'{"id": "pair", "text": "a \\ud83d\\ude00 smile"}', reason=None, id="pair", text="a \U0001f600 smile"
    ),
    "integer id": Bad(line=_row(id=12345678901234567890123, text="big id"), reason=None, id="12345678901234567890123"),
    "only unknown tokens": Bad(line=_row(id="unk", text="\U000f0000\U000f0001"), reason=None, id="unk"),
    "control characters": Bad(
        line=_row(id="../../etc/\x1b[31mpasswd", text="\x1b[2J\x07text"), reason=None, id="../../etc/\x1b[31mpasswd"
    ),
}


def read_skipped(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "_m3" / "skipped").glob("*"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def read_ids(folder: Path) -> list[str]:
    return [name for file in sorted(folder.glob("rows/*")) for name in pq.read_table(file).column("id").to_pylist()]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, tiny_m3: Path) -> tuple[Path, Completed]:
    """One corpus of all bad rows, each among good ones."""
    folder = tmp_path_factory.mktemp("many")
    lines = [b"\xef\xbb\xbf" + _row(id="with BOM", text="the first line has a byte order mark")]
    for number, bad in enumerate(BAD.values()):
        lines += [bad.line, b"", b"   ", _row(id=f"good {number}", text=f"a good row, number {number}")]
    (folder / "c.jsonl").write_bytes(b"\n".join(lines))
    command = [sys.executable, "-m", "m3cli", "encode", "c.jsonl", "--model", str(tiny_m3), "--dtype", "float32"]
    command += ["--keep-fields", "meta", "--keep-text"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return folder / "c.m3", done


def test_good_rows_among_bad_ones_are_all_encoded(many: tuple[Path, Completed]) -> None:
    folder, done = many
    assert done.returncode == 3, done.stderr
    ids = read_ids(folder)
    assert ids[0] == "with BOM"
    assert [name for name in ids if name.startswith("good")] == [f"good {number}" for number in range(len(BAD))]
    assert len(read_skipped(folder)) == sum(bad.reason is not None for bad in BAD.values())
    assert len(ids) + len(read_skipped(folder)) == 1 + 2 * len(BAD)


def test_a_folder_with_skipped_rows_ends_with_3_again(many: tuple[Path, Completed], m3_here: M3) -> None:
    corpus = many[0].parent / "c.jsonl"
    assert m3_here("encode", corpus, "--out", many[0]).returncode == 3
    done = m3_here("encode", corpus, "--out", many[0], "--max-skipped", "5")
    assert done.returncode == 4
    assert "--max-skipped 5" in done.stderr


@pytest.mark.parametrize("kind", [kind for kind, bad in BAD.items() if bad.reason is not None])
def test_a_bad_row_is_skipped_with_its_reason(kind: str, many: tuple[Path, Completed]) -> None:
    bad = BAD[kind]
    found = [row for row in read_skipped(many[0]) if row["row"] == bad.line.decode(errors="backslashreplace")]
    assert len(found) == 1
    assert found[0]["reason"] == bad.reason
    assert found[0]["id"] == bad.id
    assert found[0]["position"] == found[0]["byte_offset"]
    corpus = (many[0].parent / "c.jsonl").read_bytes()
    assert corpus[found[0]["byte_offset"] :].startswith(bad.line)


@pytest.mark.parametrize("kind", [kind for kind, bad in BAD.items() if bad.reason is None])
def test_an_odd_row_is_encoded(kind: str, many: tuple[Path, Completed]) -> None:
    bad = BAD[kind]
    rows = [row for file in sorted(many[0].glob("rows/*")) for row in pq.read_table(file).to_pylist()]
    found = [row for row in rows if row["id"] == bad.id]
    assert len(found) == 1
    if bad.text is not None:
        assert found[0]["text"] == bad.text
    if kind == "only unknown tokens":
        assert 3 not in found[0]["lexical_weights"]["indices"]


def test_names_and_rows_do_nothing_to_terminal_or_disk(many: tuple[Path, Completed]) -> None:
    folder, done = many
    assert "\x1b" not in done.stderr + done.stdout
    assert {path.name for path in folder.parent.iterdir()} == {"c.jsonl", "c.m3"}


def _encode_lines(m3_here: M3, path: Path, lines: list[bytes], model: Path, *flags: object) -> Completed:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return m3_here("encode", path.name, "--model", model, "--dtype", "float32", "--outputs", "dense", *flags)


def test_a_line_of_100_mb_is_skipped(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    lines = [_row(id="a", text="short"), _row(id="x", text="long " * 20_000_000), _row(id="b", text="short again")]
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", lines, tiny_m3)
    assert done.returncode == 3, done.stderr
    assert read_ids(tmp_path / "c.m3") == ["a", "b"]
    (skipped,) = read_skipped(tmp_path / "c.m3")
    assert skipped["reason"] == "row longer than --max-row-bytes"
    assert len(skipped["row"]) == 64 << 10


def test_duplicate_ids_are_kept_and_told(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    lines = [_row(id=f"id {number % 3}", text=f"text {number}") for number in range(8)]
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", lines, tiny_m3, "--shard-size", "64")
    assert done.returncode == 0, done.stderr
    assert len(read_ids(tmp_path / "c.m3")) == 8
    assert "3 name several documents each" in done.stderr
    assert len(list((tmp_path / "c.m3" / "rows").iterdir())) > 1


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_archive_ends_with_4_and_what_was_done_stays(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, ending: str
) -> None:
    words = [f"{n} {n * n} {n * n * n} " for n in range(3000)]
    plain = b"".join(_row(id=str(n), text=word * 50) + b"\n" for n, word in enumerate(words))
    packed = gzip.compress(plain) if ending == ".gz" else zstandard.ZstdCompressor(level=1).compress(plain)
    (tmp_path / f"c.jsonl{ending}").write_bytes(packed[: len(packed) * 3 // 4])
    flags = ["--model", str(tiny_m3), "--dtype", "float32", "--outputs", "dense", "--shard-size", "512K"]
    flags += ["--max-length", "8", "--long-docs", "truncate"]
    done = m3_here("encode", f"c.jsonl{ending}", *flags)
    assert done.returncode == 4, done.stderr
    assert "cut off" in done.stderr.splitlines()[-1]
    assert "--since-run" in done.stderr.splitlines()[-1]
    shards = len(list((tmp_path / "c.m3/_m3/done").iterdir()))
    ids = read_ids(tmp_path / "c.m3")
    assert shards >= 2
    assert ids == [str(n) for n in range(len(ids))]
    again = m3_here("encode", f"c.jsonl{ending}", *flags)
    assert again.returncode == 4
    assert len(list((tmp_path / "c.m3/_m3/done").iterdir())) == shards


def test_corrupt_parquet_ends_with_4(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"id": ["a"] * 5000, "text": [f"text {n}" for n in range(5000)]}), path)
    raw = bytearray(path.read_bytes())
    raw[100:2000] = b"\xa5" * 1900
    path.write_bytes(raw)
    done = m3_here("encode", "c.parquet", "--model", tiny_m3)
    assert done.returncode == 4, done.stderr
    assert "c.parquet" in done.stderr.splitlines()[-1]
    path.write_bytes(raw[:-10])
    done = m3_here("encode", "c.parquet", "--model", tiny_m3, "--out", "cut.m3")
    assert done.returncode == 4, done.stderr


def test_parquet_without_rows_among_others_is_no_fault(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    table = pa.table({"id": ["a", "b"], "text": ["one", None]})
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet")
    done = m3_here("encode", "a.parquet", "b.parquet", "--out", "o.m3", "--model", tiny_m3)
    assert done.returncode == 3, done.stderr
    assert read_ids(tmp_path / "o.m3") == ["a"]
    assert [row["reason"] for row in read_skipped(tmp_path / "o.m3")] == ["text is not a string"]
    alone = m3_here("encode", "a.parquet", "--model", tiny_m3)
    assert alone.returncode == 0
    assert "0 documents" in alone.stderr


def test_parquet_with_a_text_of_another_type_ends_with_4(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": ["one"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["b"], "text": [1.5]}), tmp_path / "b.parquet")
    done = m3_here("encode", "a.parquet", "b.parquet", "--out", "o.m3", "--model", tiny_m3)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "b.parquet: column 'text' is double" in done.stderr


def test_a_folder_among_the_inputs_is_read(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    (tmp_path / "in.jsonl").mkdir()
    (tmp_path / "in.jsonl" / "a.jsonl").write_bytes(_row(id="a", text="in the folder"))
    (tmp_path / "b.jsonl").write_bytes(_row(id="b", text="next to it"))
    done = m3_here("encode", "in.jsonl", "b.jsonl", "--out", "o.m3", "--model", tiny_m3, "--outputs", "dense")
    assert done.returncode == 0, done.stderr
    assert sorted(read_ids(tmp_path / "o.m3")) == ["a", "b"]
    (tmp_path / "empty").mkdir()
    done = m3_here("encode", "empty", "b.jsonl", "--out", "p.m3", "--model", tiny_m3)
    assert done.returncode == 4
    assert "empty" in done.stderr


def test_tsv_rows_with_another_number_of_columns_are_skipped(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    lines = [b"id\ttext", b"a\tone", b"b\ttwo\tthree", b"four", b'c\t"quotes" mean nothing', b"d\tcaf\xe9"]
    done = _encode_lines(m3_here, tmp_path / "c.tsv", lines, tiny_m3)
    assert done.returncode == 3, done.stderr
    assert read_ids(tmp_path / "c.m3") == ["a", "c"]
    reasons = [row["reason"] for row in read_skipped(tmp_path / "c.m3")]
    assert reasons == ["wrong number of columns", "wrong number of columns", "invalid UTF-8"]


@pytest.mark.parametrize(("limit", "code"), [("30", 3), ("29", 4), ("30%", 3), ("29.9%", 4)])
def test_too_many_skipped_rows_are_exit_4(m3_here: M3, tmp_path: Path, tiny_m3: Path, limit: str, code: int) -> None:
    lines = [_row(id=str(n), text="" if n % 10 < 3 else f"text {n}") for n in range(100)]
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", lines, tiny_m3, "--max-skipped", limit)
    assert done.returncode == code, done.stderr
    again = m3_here("encode", "c.jsonl", "--max-skipped", limit)
    assert again.returncode == code
    if code == 4:
        assert f"more than --max-skipped {limit}" in done.stderr
        assert m3_here("encode", "c.jsonl").returncode == 3


def test_max_skipped_ends_a_run_as_it_goes(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    lines = [_row(id=str(n), text="" if n % 2 else f"text {n}") for n in range(400)]
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", lines, tiny_m3, "--max-skipped", "50", "--shard-size", "1K")
    assert done.returncode == 4, done.stderr
    shards = len(list((tmp_path / "c.m3/_m3/done").iterdir()))
    assert 2 <= shards < 10
    assert not (tmp_path / "c.m3/_m3/manifest.json").exists()
    assert m3_here("encode", "c.jsonl", "--model", tiny_m3).returncode == 3
    assert len(read_ids(tmp_path / "c.m3")) == 200


def test_a_first_shard_of_one_fault_only_is_exit_4(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    lines = [_row(id=str(n), text=n) for n in range(10)]
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", lines, tiny_m3)
    assert done.returncode == 4
    assert "text is not a string" in done.stderr


BAD_LINE, GOOD_LINE, NOT_JSON = _row(id="bad", text=""), _row(id="good", text="a good row"), b"{"


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([BAD_LINE, *[GOOD_LINE] * 5], 3),
        ([_row(id="x", body="y" * 2000), *[GOOD_LINE] * 50], 3),
        ([*[BAD_LINE] * 99, GOOD_LINE], 3),
        ([*[BAD_LINE] * 100, GOOD_LINE], 4),
        ([*[BAD_LINE] * 100, NOT_JSON, GOOD_LINE], 4),
        ([*[BAD_LINE] * 50, NOT_JSON, *[BAD_LINE] * 100], 3),
        ([BAD_LINE] * 7, 4),
        ([BAD_LINE] * 6 + [NOT_JSON], 3),
    ],
)
def test_shards_of_a_row_are_judged_together(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, lines: list[bytes], code: int
) -> None:
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", lines, tiny_m3, "--shard-size", 16)
    assert done.returncode == code, done.stderr
    entries = len(list((tmp_path / "c.m3/_m3/done").glob("*")))
    if code == 4:
        assert entries == 0
        assert "empty text; check the format and the fields" in done.stderr.splitlines()[-1]
    else:
        assert len(read_skipped(tmp_path / "c.m3")) == len(lines) - lines.count(GOOD_LINE)
    assert m3_here("encode", "c.jsonl", "--model", tiny_m3).returncode == code


def test_one_bad_file_does_not_end_a_run(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(5):
        (tmp_path / f"corpus/{number}.jsonl").write_bytes(GOOD_LINE if number else BAD_LINE)
    table = pa.table({"text": ["", "good", "good"]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=1)
    for corpus in ("corpus", "c.parquet"):
        done = m3_here("encode", corpus, "--model", tiny_m3, "--outputs", "dense")
        assert done.returncode == 3, done.stderr
        assert len(read_skipped(tmp_path / f"{Path(corpus).stem}.m3")) == 1


def test_rows_of_finished_shards_count_as_seen(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    """A run that goes on after a good row is not ended by bad ones, however many."""
    flags = ("--shard-size", 64, "--max-skipped", 3)
    done = _encode_lines(m3_here, tmp_path / "c.jsonl", [GOOD_LINE, *[BAD_LINE] * 150], tiny_m3, *flags)
    assert (done.returncode, "more than --max-skipped 3" in done.stderr) == (4, True)
    assert m3_here("encode", "c.jsonl", "--model", tiny_m3).returncode == 3


def test_documents_that_fail_one_shard_at_a_time_are_judged_together(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first documents fail late, in shards of one row: skipped if a later one is encoded, else the run ends."""
    monkeypatch.setattr("m3cli.jobs.encode.pipeline.MAX_MATRIX_BYTES", 2000)
    long = _row(id="long", text="many words " * 40)
    flags = ("--shard-size", 16, "--long-docs", "merge")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([long, long, GOOD_LINE]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([long, long]))
    codes = [
        m3_here("encode", name, "--model", tiny_m3, "--dtype", "float32", *flags).returncode
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert codes == [3, 4]
    assert read_ids(tmp_path / "a.m3") == ["good"]
    assert not list((tmp_path / "b.m3/_m3/done").glob("*"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_first_row_longer_than_the_limit_is_skipped(m3_here: M3, tmp_path: Path, tiny_m3: Path, ending: str) -> None:
    first = b'{"text": "' + b"x" * (65 << 20) + b'"}\n'
    rows = first + b"".join(_row(docid=str(n), contents=f"row {n}") + b"\n" for n in range(3))
    packers: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    (tmp_path / f"c.jsonl{ending}").write_bytes(packers[ending](rows))
    done = m3_here("encode", f"c.jsonl{ending}", "--model", tiny_m3, "--outputs", "dense")
    assert done.returncode == 3, done.stderr
    assert read_ids(tmp_path / "c.m3") == ["0", "1", "2"]
    (skipped,) = read_skipped(tmp_path / "c.m3")
    assert skipped["reason"] == "row longer than --max-row-bytes"

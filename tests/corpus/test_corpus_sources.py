from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from m3cli.corpus.sources import count_unread, find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import CorpusError, UsageError


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        body = b'{"text":"a"}\n'
        if name.lower().endswith(".gz"):
            path.write_bytes(gzip.compress(body))
        elif name.endswith(".zst"):
            path.write_bytes(zstandard.compress(body))
        elif name.endswith((".parquet", ".pq")):
            pq.write_table(pa.table({"text": ["a"]}), path)
        else:
            path.write_bytes(body)


def test_formats_and_compressions_by_ending(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.ndjson", "c.json", "d.tsv", "e.txt", "f.text", "g.parquet", "h.pq", "i.jsonl.gz"]
    fill(tmp_path, *names, "j.txt.zst", "K.TSV.GZ")
    found = {s.name: (s.format, s.compression) for s in find_sources([str(tmp_path)])}
    assert found == {
        "K.TSV.GZ": ("tsv", "gzip"),
        "a.jsonl": ("jsonl", "none"),
        "b.ndjson": ("jsonl", "none"),
        "c.json": ("jsonl", "none"),
        "d.tsv": ("tsv", "none"),
        "e.txt": ("text", "none"),
        "f.text": ("text", "none"),
        "g.parquet": ("parquet", "none"),
        "h.pq": ("parquet", "none"),
        "i.jsonl.gz": ("jsonl", "gzip"),
        "j.txt.zst": ("text", "zstd"),
    }


def test_folder_is_walked_in_name_order_without_hidden_unknown_and_m3(tmp_path: Path) -> None:
    fill(tmp_path, "b.jsonl", "a/z.jsonl", "a/b/c.jsonl", "a.jsonl", ".hidden.jsonl", ".git/x.jsonl", "README.md")
    fill(tmp_path, "out.m3/rows/shard-0000000.parquet", "x.parquet.gz")
    sources = find_sources([str(tmp_path)])
    assert [s.name for s in sources] == ["a.jsonl", "a/b/c.jsonl", "a/z.jsonl", "b.jsonl"]
    status = (tmp_path / "a.jsonl").stat()
    assert (sources[0].path, sources[0].size) == (str(tmp_path / "a.jsonl"), 13)
    assert sources[0].mtime_ns == status.st_mtime_ns


def test_names_are_relative_to_the_common_folder_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "x/a.jsonl", "y/z/a.jsonl", "y/b.jsonl")
    monkeypatch.chdir(tmp_path)

    def names(*inputs: str) -> list[str]:
        return [source.name for source in find_sources(inputs)]

    assert names("x/a.jsonl") == ["a.jsonl"]
    assert names("y") == ["b.jsonl", "z/a.jsonl"]
    assert names("y/z") == ["a.jsonl"]
    assert names("y/b.jsonl", "x/a.jsonl") == ["y/b.jsonl", "x/a.jsonl"], "the user's order is kept"
    assert names("y/b.jsonl", "y/z") == ["b.jsonl", "z/a.jsonl"]
    assert names("y/*.jsonl") == ["b.jsonl"]
    assert names("**/*.jsonl") == ["x/a.jsonl", "y/b.jsonl", "y/z/a.jsonl"]


def test_glob_takes_known_endings_and_a_literal_name_wins(tmp_path: Path) -> None:
    fill(tmp_path, "a[1].jsonl", "a1.jsonl", "README.md", "o.m3/rows/x.parquet")
    assert [s.name for s in find_sources([str(tmp_path / "a[1].jsonl")])] == ["a[1].jsonl"]
    assert [s.name for s in find_sources([str(tmp_path / "**")])] == ["a1.jsonl", "a[1].jsonl"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'  {"text":1}', ("jsonl", "none")),
        (b'\xef\xbb\xbf{"text":1}', ("jsonl", "none")),
        (b"plain \xc3\xa9", ("text", "none")),
        ("é".encode() * 5000, ("text", "none")),
        (b"x" + "é".encode() * 5000, ("text", "none")),
        (gzip.compress(b"{}", mtime=0), ("jsonl", "gzip")),
        (zstandard.compress(b"x"), ("text", "zstd")),
    ],
)
def test_unknown_ending_and_stdin_are_sniffed(tmp_path: Path, body: bytes, expected: tuple[str, str]) -> None:
    stdin = PeekableStream(io.BytesIO(body))
    (piped,) = find_sources(["-"], stdin=stdin)
    assert (piped.name, piped.path, piped.size, piped.mtime_ns) == ("stdin", "-", -1, -1)
    assert (piped.format, piped.compression) == expected
    assert stdin.read(1 << 20) == body
    if expected[1] == "none":
        (tmp_path / "corpus").write_bytes(body)
        (source,) = find_sources([str(tmp_path / "corpus")])
        assert (source.format, source.compression) == expected


def test_input_format_overrides_ending_and_sniffing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"1\ta\n")
    assert find_sources([str(tmp_path / "a.csv")], input_format="tsv")[0].format == "tsv"
    stdin = PeekableStream(io.BytesIO(b"{}\n"))
    assert find_sources(["-"], input_format="text", stdin=stdin)[0].format == "text"
    with pytest.raises(
        UsageError, match="--input-format xml: it is one of auto, jsonl, csv, tsv, text, parquet, arrow"
    ):
        find_sources(["-"], input_format="xml", stdin=stdin)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.csv.bz2", b"BZh", r"a\.csv\.bz2: decompress it and pipe it in"),
        ("a.json", b' [\n{"text":1}]', r"a\.json is one JSON array.*jq -c '\.\[\]'"),
        ("a.json.gz", gzip.compress(b"[1]", mtime=0), r"a\.json\.gz is one JSON array.*jq"),
        ("a.jsonl", b'[{"text":1}]', r"a\.jsonl is one JSON array.*jq"),
        ("a", b'[\n  {"text":1}]', r"a is one JSON array.*jq"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"a\.jsonl is gzip data without the ending of it: add \.gz"),
        ("a.jsonl", zstandard.compress(b"{}"), r"a\.jsonl is zstd data without the ending of it: add \.zst"),
        ("a.jsonl.gz", b"{}\n", r"a\.jsonl\.gz is called gzip by its ending but is not compressed: rename it"),
        (
            "a.txt.zst",
            gzip.compress(b"x", mtime=0),
            r"a\.txt\.zst is called zstd by its ending but is gzip data: rename it",
        ),
        ("a.arrow", b"{}\n", r"a\.arrow should be Arrow but is not Arrow"),
        ("a.feather", b"", r"a\.feather should be Arrow but is empty"),
        ("a.parquet", b"ARROW1\0\0", r"a\.parquet is Arrow but should be parquet: rename it to end in \.arrow"),
        ("a.parquet", b"{}\n", r"a\.parquet should be Parquet but is not Parquet"),
        ("a.parquet", b"", r"a\.parquet should be Parquet but is empty"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), r"a\.parquet\.gz should be Parquet but is gzip data"),
        ("a.jsonl", b"PAR1xxxx", r"a\.jsonl is Parquet but should be jsonl: rename it to end in \.parquet"),
        ("a.jsonl", '{"text":1}'.encode("utf-16"), r"a\.jsonl is UTF-16: convert it with iconv"),
        ("a.bin", b"\x80\x81\x00", r"a\.bin is neither JSONL nor text in UTF-8.*--input-format"),
        ("a.bin", b"x" * 4000 + b"\xff" + b"x" * 95, r"a\.bin is neither JSONL nor text in UTF-8"),
        ("a.jsonl.xz", b"\xfd7zXZ", r"a\.jsonl\.xz: decompress it and pipe it in"),
        ("a.jsonl", b"", r"a\.jsonl: nothing to encode, only empty files"),
    ],
)
def test_unreadable_file_is_refused_with_its_remedy(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(CorpusError, match=message):
        find_sources([str(tmp_path / name)])


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nope\.jsonl: no such file or folder"):
        find_sources([str(tmp_path / "nope.jsonl")])
    with pytest.raises(CorpusError, match=r"\*\.jsonl: no file matches; files ending in \.jsonl"):
        find_sources([str(tmp_path / "*.jsonl")])
    with pytest.raises(CorpusError, match=r"nothing to read in this folder; files ending in \.jsonl"):
        find_sources([str(tmp_path)])
    (tmp_path / "a.md").write_bytes(b"# A")
    with pytest.raises(CorpusError, match=r"are read; with --per-file each text file is a document"):
        find_sources([str(tmp_path)])
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(CorpusError, match=r"nothing to read in this folder; a\.zip: unpack it first"):
        find_sources([str(tmp_path)])
    with pytest.raises(CorpusError, match=r"\*: no match can be read"):
        find_sources([str(tmp_path / "*")])
    (tmp_path / "x.m3").mkdir()
    with pytest.raises(CorpusError, match=r"x\.m3 is a folder that m3 writes"):
        find_sources([str(tmp_path / "x.m3")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match=r"pipe is not a regular file: pipe it in, with '-'"):
        find_sources([str(tmp_path / "pipe")])


def test_empty_files_among_others_are_sources_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    fill(tmp_path, "b.jsonl")
    assert [(s.name, s.compression, s.size) for s in find_sources([str(tmp_path)])] == [
        ("a.jsonl.gz", "gzip", 0),
        ("b.jsonl", "none", 13),
    ]


def test_same_file_twice_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl")
    with pytest.raises(UsageError, match=r"a\.jsonl is among the inputs twice: name it once"):
        find_sources([str(tmp_path), str(tmp_path / "a.jsonl")])
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UsageError, match=r"b\.jsonl is among the inputs twice \(also as .*a\.jsonl\)"):
        find_sources([str(tmp_path)])


def test_stdin_must_be_alone_not_empty_and_no_parquet() -> None:
    with pytest.raises(UsageError, match="must be the only input"):
        find_sources(["-", "a"], stdin=PeekableStream(io.BytesIO(b"x")))
    with pytest.raises(CorpusError, match="standard input is empty"):
        find_sources(["-"], stdin=PeekableStream(io.BytesIO(b"")))
    with pytest.raises(CorpusError, match="Parquet cannot be read from standard input"):
        find_sources(["-"], stdin=PeekableStream(io.BytesIO(b"PAR1....")))
    with pytest.raises(CorpusError, match="Parquet cannot be read from standard input"):
        find_sources(["-"], input_format="parquet", stdin=PeekableStream(io.BytesIO(b"x")))
    with pytest.raises(UsageError, match="no input"):
        find_sources([])


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("hf://datasets/owner/name", "hf download"),
        ("https://example.org/c.jsonl.gz", "curl"),
        ("abfss://container/c.jsonl", "copy it here first"),
    ],
)
def test_inputs_elsewhere_are_refused_with_the_way_to_copy_them(given: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=f"{given}: m3 reads local files; copy it here first.*{remedy}|{remedy}"):
        find_sources([given])


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    fill(corpus, "real/a.jsonl")
    fill(elsewhere, "b.jsonl", "deep/c.jsonl", "skip.m3/d.jsonl")
    (corpus / "a-link-to-real").symlink_to(corpus / "real")
    (corpus / "link").symlink_to(elsewhere)
    (corpus / "link-again").symlink_to(elsewhere / "deep")
    (corpus / "hidden").symlink_to(elsewhere / "skip.m3")
    (corpus / ".dotted").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(corpus)
    (elsewhere / "self").symlink_to(elsewhere)
    assert [s.name for s in find_sources([str(corpus)])] == ["link/b.jsonl", "link/deep/c.jsonl", "real/a.jsonl"]


def test_files_that_are_not_read_are_counted_by_their_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.jsonl", "b/c.md", "b/d.MD", "e.xml", "f.xml.gz", "g.parquet.zst", "Makefile", "h.tar.gz", "x.md")
    fill(tmp_path, ".hidden.md", ".git/x.md", "out.m3/rows/x.md", "out.m3/_m3/run.json")
    monkeypatch.chdir(tmp_path)
    endings = {".md": 3, ".parquet.zst": 1, ".tar.gz": 1, ".xml": 1, ".xml.gz": 1, "without ending": 1}
    assert count_unread(["."]) == endings
    assert count_unread(["."]) == count_unread([str(tmp_path), "a.jsonl"])
    assert count_unread(["b", "a.jsonl"]) == {".md": 2}
    assert count_unread(["*.md", "a.jsonl", "b/*"]) == {".md": 3}
    assert count_unread(["a.jsonl"]) == count_unread(["-"]) == {}
    assert list(count_unread(["."])) == [".md", ".parquet.zst", ".tar.gz", ".xml", ".xml.gz", "without ending"]


ASCII = '{"text":"a plain row"}\n'
CYRILLIC = "\u0434\u0439\u0437\u0431 \u0434\u0439\u0437\u0431\n" * 3


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a", "a.txt.gz"])
@pytest.mark.parametrize("text", [ASCII, ASCII * 500, CYRILLIC * 100, "ab"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32"])
def test_utf16_and_utf32_are_refused_by_name(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    called = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(CorpusError, match=rf"{name} is {called}.*: convert it with iconv -f {called} -t UTF-8$"):
        find_sources([str(tmp_path / name)])


@pytest.mark.parametrize("body", [b"a\0b\n", b"\0", b"one\0two\0three\0\n" * 50, b"a\0" + b"plain text \0\n" * 9])
def test_text_with_a_nul_here_and_there_is_text(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(body)
    assert find_sources([str(tmp_path / "a.txt")])[0].format == "text"

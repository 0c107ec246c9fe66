from __future__ import annotations

import gzip
import io
import os
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m3cli.corpus.rows import TOO_LONG, Fault
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import ByteStream, LineStream, PeekableStream, check_unchanged, read_head, split_rows
from m3cli.errors import CorpusError
from m3cli.records import Source


class OneByte:
    """A pipe that gives a byte at a time."""

    def __init__(self, body: bytes) -> None:
        self._stream = io.BytesIO(body)

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, 1))


def read_whole(source: Source, *, stdin: PeekableStream | None = None) -> bytes:
    parts = []
    with ByteStream(source, stdin=stdin) as stream:
        while part := stream.read(1 << 16):
            parts.append(part)
    return b"".join(parts)


def test_peeking_loses_nothing() -> None:
    stream = PeekableStream(OneByte(b"abcdef"))
    assert stream.peek(3) == b"abc"
    assert stream.peek(2) == b"ab"
    assert stream.read(1) == b"a"
    assert stream.read(4) == b"bcde"
    assert stream.peek(9) == b"f"
    assert (stream.read(9), stream.read(9)) == (b"f", b"")


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def long_window(body: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=29, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("ending", "packed"),
    [
        (".gz", gzip.compress(b"one\n") + gzip.compress(b"") + gzip.compress(b"two\n")),
        (".gz", gzip.compress(b"one\ntwo\n") + b"\0" * 100),
        (".zst", zstandard.compress(b"one\n") + zstandard.compress(b"two\n")),
        (".zst", SKIPPABLE + zstandard.compress(b"one\n") + SKIPPABLE + zstandard.compress(b"two\n") + SKIPPABLE),
        (".zst", long_window(b"one\ntwo\n")),
    ],
    ids=["members", "padding", "frames", "skippable", "long"],
)
def test_all_members_and_frames_are_read(tmp_path: Path, ending: str, packed: bytes) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed)
    (source,) = find_sources([str(path)])
    assert read_whole(source) == b"one\ntwo\n"
    assert read_head(source, 5) == b"one\nt"
    stdin = PeekableStream(OneByte(packed))
    (piped,) = find_sources(["-"], stdin=stdin)
    assert piped.compression == source.compression
    assert read_head(piped, 5, stdin=stdin) == b"one\nt"
    assert read_whole(piped, stdin=stdin) == b"one\ntwo\n"


def test_head_of_a_long_compressed_pipe_is_found_and_nothing_lost() -> None:
    body = b"".join(b"%d\n" % (i * 7919**9) for i in range(300_000))
    for packed in (gzip.compress(body, 1), zstandard.compress(body)):
        stdin = PeekableStream(io.BytesIO(packed))
        (source,) = find_sources(["-"], stdin=stdin)
        assert read_head(source, 1 << 20, stdin=stdin) == body[: 1 << 20]
        assert read_whole(source, stdin=stdin) == body


@pytest.mark.parametrize("packed", [gzip.compress(b"one\ntwo\n"), zstandard.compress(b"one\ntwo\n")], ids=["gz", "zst"])
def test_cut_off_and_damaged_pipes_are_told(packed: bytes) -> None:
    kind = "gzip" if packed.startswith(b"\x1f") else "zstd"
    with pytest.raises(CorpusError, match=f"stdin ends in the middle of its {kind} data: it was cut off; copy"):
        find_sources(["-"], stdin=PeekableStream(io.BytesIO(packed[:-1])))
    with pytest.raises(CorpusError, match=f"stdin is corrupt {kind} data"):
        find_sources(["-"], stdin=PeekableStream(io.BytesIO(packed + b"garbage")))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_compression_bomb_does_not_fill_memory(tmp_path: Path, kind: str) -> None:
    body = bytes(256 << 20)
    path = tmp_path / ("a.txt.gz" if kind == "gzip" else "a.txt.zst")
    path.write_bytes(gzip.compress(body, 1) if kind == "gzip" else zstandard.compress(body))
    del body
    (source,) = find_sources([str(path)])
    tracemalloc.start()
    try:
        with ByteStream(source) as stream:
            assert len(stream.read(1 << 20)) >= 1 << 20
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()


def test_unchanged_file_passes_and_a_missing_or_unreadable_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n")
    (source,) = find_sources([str(path)])
    check_unchanged(source)
    path.unlink()
    with pytest.raises(CorpusError, match=r"a.txt is missing: put it back and run the same command again"):
        ByteStream(source)
    path.mkdir()
    with pytest.raises(CorpusError, match=r"a.txt cannot be read: Is a directory"):
        ByteStream(source)


class Dribble:
    """A stream that gives few bytes at a time."""

    def __init__(self, body: bytes, step: int) -> None:
        self._stream = io.BytesIO(body)
        self._step = step

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, self._step))


def list_lines(body: bytes) -> list[tuple[int, bytes]]:
    """Return offset and bytes of each line with its newline, found one after the other."""
    found, offset = [], 0
    for line in io.BytesIO(body):
        found.append((offset, line))
        offset += len(line)
    return found


def list_rows(body: bytes, *, max_row_bytes: int, header: bool) -> list[tuple[int, bytes | str]]:
    rows: list[tuple[int, bytes | str]] = []
    for offset, line in list_lines(body):
        bare = line.removesuffix(b"\n")
        row = bare if offset else b"" if header else bare.removeprefix(b"\xef\xbb\xbf")
        if row and len(bare) > max_row_bytes:
            rows.append((offset, TOO_LONG))
        elif row.strip():
            rows.append((offset, row))
    return rows


bodies = st.lists(
    st.sampled_from([b"a", b"bb", b" ", b"\r", b"\n", b"\n", b"\xef\xbb\xbf", b"c" * 12]), max_size=60
).map(b"".join)


@settings(deadline=None, max_examples=400)
@given(
    body=bodies,
    step=st.integers(1, 9),
    size=st.integers(1, 40),
    max_row_bytes=st.integers(3, 15),  # not less than a BOM
    limit=st.none() | st.integers(0, 20),
    header=st.booleans(),
)
@example(body=b"aaaa", step=2, size=3, max_row_bytes=3, limit=1, header=False)
def test_lines_are_those_that_begin_in_the_shard_up_to_the_last_row_wanted(
    body: bytes, step: int, size: int, max_row_bytes: int, limit: int | None, header: bool
) -> None:
    stream = LineStream(Dribble(body, step), offset=0, max_row_bytes=max_row_bytes, rows_left=limit, header=header)
    expected = list_rows(body, max_row_bytes=max_row_bytes, header=header)
    end = len(body)
    if limit is not None and len(expected) >= limit:
        last = expected[limit - 1][0] if limit else 0
        end = next(o + len(line) for o, line in list_lines(body) if o == last) if limit else 0
        expected = expected[:limit]
    raw = b""
    rows: list[tuple[int, bytes | str]] = []
    start = 0
    while stream.offset > start or stream.has_more():
        blocks = list(stream.take(start + size))
        region = b"".join(block.raw for block in blocks)
        assert region == b"".join(line for o, line in list_lines(body[:end]) if start <= o < start + size)
        raw += region
        for offset, row, parsed in split_rows(
            blocks, lambda line: {"row": line}, max_row_bytes=max_row_bytes, header=header
        ):
            rows.append((offset, parsed.reason if isinstance(parsed, Fault) else row))
        start += size
    assert raw == body[:end]
    assert rows == expected
    assert -(-end // size) == start // size


def test_a_line_without_end_is_never_held_whole() -> None:
    class Bomb:
        given = 0

        def read(self, size: int, /) -> bytes:
            self.given += size
            return b"x" * size if self.given < 200 << 20 else b""

    largest = 0
    for block in LineStream(Bomb(), offset=0, max_row_bytes=4 << 20).take(1):
        largest = max(largest, len(block.raw))
    assert largest <= 6 << 20


def test_a_disk_that_is_lost_is_a_corpus_error(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"x" * 99)
    (source,) = find_sources([str(tmp_path / "c.jsonl")])
    with ByteStream(source) as stream:
        assert stream._file is not None
        os.close(stream._file.fileno())  # the file's own close fails then, as on a lost mount
        with pytest.raises(CorpusError, match="Bad file descriptor"):
            stream.read(10)

from __future__ import annotations

import io

from hypothesis import example, given, settings
from hypothesis import strategies as st

from m3cli.corpus.lines import LineStream, split_rows
from m3cli.corpus.rows import TOO_LONG, Fault


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

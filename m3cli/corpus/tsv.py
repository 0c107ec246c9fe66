"""One line of tab-separated values as a row. There is no quoting: a tab always separates, a newline always ends."""

from __future__ import annotations

from collections.abc import Sequence

from m3cli.corpus.rows import INVALID_UTF8, WRONG_COLUMNS, Fault, Row


def split_cells(line: str) -> tuple[str, ...]:
    r"""Return the cells of a line, which may still end in \r or \n."""
    return tuple(line.removesuffix("\n").removesuffix("\r").split("\t"))


def parse_tsv_line(line: bytes, *, columns: Sequence[str]) -> Row | Fault:
    """Parse one line with the cells of these columns."""
    try:
        cells = split_cells(line.decode())
    except UnicodeDecodeError as wrong:
        return Fault(reason=INVALID_UTF8, detail=f"{wrong.reason} at byte {wrong.start} of the row")
    if len(cells) != len(columns):
        return Fault(reason=WRONG_COLUMNS, detail=f"it has {len(cells)} instead of {len(columns)}")
    return dict(zip(columns, cells, strict=True))

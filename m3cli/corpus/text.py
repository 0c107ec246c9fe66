"""One line of plain text as a row with nothing but its text."""

from __future__ import annotations

from m3cli.corpus.rows import INVALID_UTF8, Fault, Row


def parse_text_line(line: bytes, *, text_field: str) -> Row | Fault:
    """Parse one line."""
    try:
        return {text_field: line.decode().removesuffix("\r")}
    except UnicodeDecodeError as wrong:
        return Fault(reason=INVALID_UTF8, detail=f"{wrong.reason} at byte {wrong.start} of the row")

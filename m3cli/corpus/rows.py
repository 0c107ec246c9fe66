"""Documents, or skipped rows with a reason, from the rows of every format.

The text is title + separator + text, or one of them if the other is blank. An invalid row never raises: it becomes a
skipped row with one of the fixed reasons below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import xxhash

from m3cli.records import Document, Fields, SkippedRow, Source

INVALID_JSON = "invalid JSON"
INVALID_CSV = "invalid CSV"
INVALID_UTF8 = "invalid UTF-8"
LONE_SURROGATE = "lone surrogate"
NOT_AN_OBJECT = "not a JSON object"
WRONG_COLUMNS = "wrong number of columns"
NO_TEXT = "no text field"
TEXT_NOT_A_STRING = "text is not a string"
TITLE_NOT_A_STRING = "title is not a string"
EMPTY_TEXT = "empty text"
BAD_ID = "id is not a string or integer"
TOO_LONG = "row longer than --max-row-bytes"

ROW_HEAD_BYTES = 64 << 10
"of a skipped row that are stored"
_LOW_HALF = (1 << 64) - 1
_STRUCTURE = re.compile(rb'["{}\[\],:]')
_INTEGER = re.compile(r"-?[0-9]+")

Row = dict[str, Any]
"a row's fields by name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a row is not a document."""

    reason: str
    detail: str = ""


RawRow = tuple[int, bytes, Row | Fault]
"position, bytes (none for a valid row of Parquet), fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRows:
    """The results of parsing rows."""

    documents: list[Document] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    "of each document in the rows"
    kept: list[list[str | None]] = field(default_factory=list)
    "for each kept field, one value a document"
    skipped: list[SkippedRow] = field(default_factory=list)


def build_documents(
    rows: Iterable[RawRow], *, source: Source, fields: Fields, title_sep: str, kept: tuple[str, ...] = ()
) -> ParsedRows:
    """Return a document or a skipped row for each row, with the fields `kept` as text."""
    parsed = ParsedRows(kept=[[] for _ in kept])
    for index, (position, raw, row) in enumerate(rows):
        document = row if isinstance(row, Fault) else _make_document(row, raw, position, source.name, fields, title_sep)
        if isinstance(row, Fault) or isinstance(document, Fault):
            fault = document if isinstance(document, Fault) else row
            assert isinstance(fault, Fault)
            parsed.skipped.append(_skip_row(row, raw, position, fault, source=source, fields=fields))
            continue
        parsed.documents.append(document)
        parsed.indices.append(index)
        for column, value in zip(parsed.kept, format_kept(row, raw, kept), strict=True):
            column.append(value)
    return parsed


def format_kept(row: Row, raw: bytes, kept: Collection[str]) -> list[str | None]:
    """Return kept fields as text: a string's value, anything else exactly as written in the row."""
    values = {name: find_value(row, name) for name in kept}
    texts = {name: value if type(value) is str else _format_plain(value, raw) for name, value in values.items()}
    missing = [name for name, value in values.items() if value is not None and texts[name] is None]
    if missing:
        members = dict(find_members(raw))
        texts |= {name: _find_written(members, name) for name in missing}
    return [texts[name] for name in kept]


def find_value(row: Row, name: str) -> Any:
    """Return the value of a field; of 'a.b', unless a field has that name, the value of b in the object a."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if type(value) is dict else None
    return value


def list_fields(row: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a row's fields, followed by those inside objects as 'a.b'."""
    yield from ((prefix + name, value) for name, value in row.items() if not prefix or "." not in name)
    for name, value in row.items():
        if type(value) is dict and "." not in name:
            yield from list_fields(value, f"{prefix}{name}.")


def _find_written(members: dict[str, str], name: str) -> str | None:
    """Return the value that `find_value` finds as it is written, from the members of a row."""
    if name in members:
        return members[name]
    text = None
    for part in name.split("."):
        text = members.get(part)
        members = dict(find_members(text.encode())) if text and text.startswith("{") else {}
    return text


def _format_plain(value: Any, raw: bytes) -> str | None:
    """Return the only JSON text of a value; None: there may be several, or the value is null."""
    if type(value) is bool:
        return "true" if value else "false"
    return str(value) if type(value) is int and (value or b"-0" not in raw) else None


def find_members(line: bytes) -> Iterator[tuple[str, str]]:
    """Yield the names and values of a valid JSON object as written; the last one of a name counts."""
    depth, at, start, name = 0, 0, 0, ""
    while found := _STRUCTURE.search(line, at):
        char, at = found.group(), found.end()
        if char == b'"':
            at = _find_string_end(line, at)
            continue
        depth += (char in b"{[") - (char in b"}]")
        if depth == 1 and char == b":":
            name = orjson.loads(line[start : at - 1])
        elif name and (depth == 0 or (depth == 1 and char == b",")):
            yield name, line[start : at - 1].strip().decode()
        if depth == 1 and char in b"{:,":
            start = at


def _find_string_end(line: bytes, at: int) -> int:
    """Return the index after the quote that ends a string; `at` is inside it."""
    while True:
        quote = line.index(b'"', at)
        text = line[at:quote]
        at = quote + 1
        if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:
            return at


def _make_document(
    row: Row, raw: bytes, position: int, source: str, fields: Fields, title_sep: str
) -> Document | Fault:
    text = find_value(row, fields.text)
    if type(text) is not str:
        return _fault_text(row, fields.text)
    title = None if fields.title is None else find_value(row, fields.title)
    if title is not None:
        if type(title) is not str:
            return Fault(reason=TITLE_NOT_A_STRING, detail=f"it is {name_type(title)}")
        text = _join(title, title_sep, text)
    if not text or text.isspace():
        return Fault(reason=EMPTY_TEXT)
    own_id = None if fields.id is None else find_value(row, fields.id)
    if own_id is not None and type(own_id) is not str:
        own_id = _id_text(own_id, raw, fields.id or "")
        if own_id is None:
            return Fault(reason=BAD_ID, detail=f"it is {name_type(find_value(row, fields.id or ''))}")
    text_hash = xxhash.xxh3_128_intdigest(text.encode())
    return Document(
        id=own_id or f"{source}:{position}",
        text=text,
        text_hash=(text_hash >> 64, text_hash & _LOW_HALF),
        has_own_id=bool(own_id),
        position=position,
    )


def _join(title: str, title_sep: str, text: str) -> str:
    if not title or title.isspace():
        return text
    return title + title_sep + text if text and not text.isspace() else title


def _fault_text(row: Row, name: str) -> Fault:
    value = find_value(row, name)
    if name in row or value is not None:
        return Fault(reason=TEXT_NOT_A_STRING, detail=f"it is {name_type(value)}")
    return Fault(reason=NO_TEXT, detail=f"the row has {', '.join(list(row)[:20]) or 'no fields'}"[:1000])


def name_type(value: Any) -> str:
    """Return JSON's name of a value's type."""
    names = {type(None): "null", bool: "a boolean", str: "a string", dict: "an object", list: "an array"}
    return names.get(type(value), "a number")


def _id_text(value: Any, raw: bytes, name: str) -> str | None:
    """Return an integer in decimal, None for anything else; for orjson one of more than 64 bits is a float."""
    if type(value) is float and raw:
        text = _find_written(dict(find_members(raw)), name) or ""
        return text if _INTEGER.fullmatch(text) else None
    return str(value) if type(value) is int else None


def _skip_row(
    row: Row | Fault, raw: bytes, position: int, fault: Fault, *, source: Source, fields: Fields
) -> SkippedRow:
    own_id = None
    if not isinstance(row, Fault):
        value = find_value(row, fields.id or "")
        own_id = value if type(value) is str else _id_text(value, raw, fields.id or "")
        raw = raw or orjson.dumps(row)
    return SkippedRow(
        source=source.name,
        position=position,
        byte_offset=position if source.in_bytes else None,
        id=own_id or None,
        reason=fault.reason,
        detail=fault.detail,
        row=raw[:ROW_HEAD_BYTES],
    )


def parse_json_line(line: bytes) -> Row | Fault:
    """Parse one line of JSON."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _explain(line, error)
    return row if type(row) is dict else Fault(reason=NOT_AN_OBJECT, detail=f"it is {name_type(row)}")


def _explain(line: bytes, error: orjson.JSONDecodeError) -> Fault:
    try:
        text = line.decode()
    except UnicodeDecodeError as cause:
        return fault_decoding(cause)
    # Python's parser accepts escapes of lone surrogates, which orjson does not and UTF-8 cannot represent.
    if "\\ud" in text.lower():
        try:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Fault(reason=LONE_SURROGATE, detail=f"at character {error.pos} of the row")
        except (ValueError, RecursionError):
            pass
    return Fault(reason=INVALID_JSON, detail=error.msg)


def fault_decoding(error: UnicodeDecodeError) -> Fault:
    """Return the fault of a row that is not UTF-8."""
    return Fault(reason=INVALID_UTF8, detail=f"{error.reason} at byte {error.start} of the row")


def split_cells(line: str) -> tuple[str, ...]:
    r"""Return the cells of a line, which may end in \r or \n."""
    return tuple(line.removesuffix("\n").removesuffix("\r").split("\t"))


def parse_tsv_line(line: bytes, *, columns: Sequence[str]) -> Row | Fault:
    """Parse one line with these columns."""
    try:
        cells = split_cells(line.decode())
    except UnicodeDecodeError as cause:
        return fault_decoding(cause)
    return name_cells(columns, cells)


def name_cells(columns: Sequence[str], cells: Sequence[str]) -> Row | Fault:
    """Return the cells of TSV or CSV as a row."""
    if len(cells) != len(columns):
        return Fault(reason=WRONG_COLUMNS, detail=f"it has {len(cells)} instead of {len(columns)}")
    return dict(zip(columns, cells, strict=True))


def parse_text_line(line: bytes, *, text_field: str) -> Row | Fault:
    """Return a line of text as a row."""
    try:
        return {text_field: line.decode().removesuffix("\r")}
    except UnicodeDecodeError as cause:
        return fault_decoding(cause)

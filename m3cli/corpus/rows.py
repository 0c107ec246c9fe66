"""What makes a row a document, or a skipped row with its reason; the same for every format.

The text is title + separator + text; where one of the two is blank it is the other alone. A bad row is data: it is
kept with one of the fixed phrases below, never raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
import xxhash

from m3cli.records import Document, Fields, SkippedRow, Source

INVALID_JSON = "invalid JSON"
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
TOO_DEEP = "kept field nested too deep"

ROW_HEAD_BYTES = 64 << 10
"how much of a skipped row is kept"
_LOW_HALF = (1 << 64) - 1
_EXACT_UP_TO = float(1 << 63)

Row = dict[str, Any]
"a row's fields by name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a row is no document."""

    reason: str
    detail: str = ""


RawRow = tuple[int, bytes, Row | Fault]
"position, bytes as they were read (none for Parquet, if the row has no fault), fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What rows became."""

    documents: list[Document] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    "of each document among the rows"
    kept: list[list[str | None]] = field(default_factory=list)
    "for each kept field, one value a document"
    skipped: list[SkippedRow] = field(default_factory=list)


def gather_documents(
    rows: Iterable[RawRow], *, source: Source, fields: Fields, title_sep: str, kept: tuple[str, ...] = ()
) -> Gathered:
    """Make a document or a skipped row of each row; the fields `kept` are gathered as text."""
    gathered = Gathered(kept=[[] for _ in kept])
    for place, (position, raw, row) in enumerate(rows):
        made = row if isinstance(row, Fault) else _make_document(row, raw, position, source.name, fields, title_sep)
        values = _spell_kept(row, raw, kept) if kept and not isinstance(row, Fault) else []
        if isinstance(made, Fault) or isinstance(values, Fault):
            fault = made if isinstance(made, Fault) else values
            assert isinstance(fault, Fault)
            gathered.skipped.append(_skip_row(row, raw, position, fault, source=source, fields=fields))
            continue
        gathered.documents.append(made)
        gathered.places.append(place)
        for column, value in zip(gathered.kept, values, strict=True):
            column.append(value)
    return gathered


def _spell_kept(row: Row, raw: bytes, kept: tuple[str, ...]) -> list[str | None] | Fault:
    values: list[str | None] = []
    for name in kept:
        value = row.get(name)
        try:
            values.append(value if value is None or type(value) is str else _as_json(value, raw, name))
        except TypeError:  # orjson reads 1,024 levels and writes 254
            return Fault(reason=TOO_DEEP, detail=f"{name!r} has more than 254 levels: leave it out of --keep-fields")
    return values


def _make_document(
    row: Row, raw: bytes, position: int, source: str, fields: Fields, title_sep: str
) -> Document | Fault:
    text = row.get(fields.text)
    if type(text) is not str:
        return _fault_text(row, fields.text)
    title = None if fields.title is None else row.get(fields.title)
    if title is not None:
        if type(title) is not str:
            return Fault(reason=TITLE_NOT_A_STRING, detail=f"it is {name_type(title)}")
        text = _join(title, title_sep, text)
    if not text or text.isspace():
        return Fault(reason=EMPTY_TEXT)
    own_id = None if fields.id is None else row.get(fields.id)
    if own_id is not None and type(own_id) is not str:
        own_id = _id_text(own_id, raw, fields.id or "")
        if own_id is None:
            return Fault(reason=BAD_ID, detail=f"it is {name_type(row.get(fields.id or ''))}")
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
    if name in row:
        return Fault(reason=TEXT_NOT_A_STRING, detail=f"it is {name_type(row[name])}")
    return Fault(reason=NO_TEXT, detail=f"the row has {', '.join(list(row)[:20]) or 'no fields'}"[:1000])


def name_type(value: Any) -> str:
    """Return what JSON calls a value."""
    names = {type(None): "null", bool: "a boolean", str: "a string", dict: "an object", list: "an array"}
    return names.get(type(value), "a number")


def _id_text(value: Any, raw: bytes, name: str) -> str | None:
    exact = _exact_number(value, raw, name)
    return str(exact) if type(exact) is int else None


def _as_json(value: Any, raw: bytes, name: str) -> str:
    return orjson.dumps(value).decode() if type(value) is not float else json.dumps(_exact_number(value, raw, name))


def _exact_number(value: Any, raw: bytes, name: str) -> Any:
    """Return a number as it is written: orjson makes a float of an integer of more than 64 bits."""
    if type(value) is float and abs(value) >= _EXACT_UP_TO:
        return json.loads(raw)[name]
    return value


def _skip_row(
    row: Row | Fault, raw: bytes, position: int, fault: Fault, *, source: Source, fields: Fields
) -> SkippedRow:
    own_id = None
    if not isinstance(row, Fault):
        value = row.get(fields.id or "")
        own_id = value if type(value) is str else _id_text(value, raw, fields.id or "")
        raw = raw or orjson.dumps(row)
    return SkippedRow(
        source=source.name,
        position=position,
        byte_offset=None if source.format == "parquet" else position,
        id=own_id or None,
        reason=fault.reason,
        detail=fault.detail,
        row=raw[:ROW_HEAD_BYTES],
    )

"""One line of JSONL as a row."""

from __future__ import annotations

import json

import orjson

from m3cli.corpus.rows import INVALID_JSON, INVALID_UTF8, LONE_SURROGATE, NOT_AN_OBJECT, Fault, Row, name_type


def parse_json_line(line: bytes) -> Row | Fault:
    """Parse one line."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _explain(line, error)
    return row if type(row) is dict else Fault(reason=NOT_AN_OBJECT, detail=f"it is {name_type(row)}")


def _explain(line: bytes, error: orjson.JSONDecodeError) -> Fault:
    try:
        text = line.decode()
    except UnicodeDecodeError as wrong:
        return Fault(reason=INVALID_UTF8, detail=f"{wrong.reason} at byte {wrong.start} of the row")
    # orjson refuses what Python's parser lets through: escapes of half a character, which no UTF-8 can hold.
    if "\\ud" in text.lower():
        try:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Fault(reason=LONE_SURROGATE, detail=f"at character {error.pos} of the row")
        except (ValueError, RecursionError):
            pass
    return Fault(reason=INVALID_JSON, detail=error.msg)

"""JSON documents whose last member, `checksum`, is the xxh3_128 of the same document without it.

The spelling is fixed: members in the order they were given, indented by 2, a newline at the end. So equal documents
are equal bytes, and a checksum is tested on the bytes as they lie there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import xxhash

from m3cli.errors import DamageFound

_OPENING = b',\n  "checksum": "'
_CLOSING = b'"\n}\n'
_SEAL_LENGTH = len(_OPENING) + 32 + len(_CLOSING)
_END = b"\n}\n"


def seal_json(document: dict[str, Any]) -> bytes:
    """Spell a document of at least one member out, its checksum last."""
    body = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return body[: -len(_END)] + _seal(body)


def read_json(path: Path) -> dict[str, Any]:
    """Read a document and take its checksum off; a file that does not match it raises DamageFound."""
    raw = path.read_bytes()
    body = raw[:-_SEAL_LENGTH] + _END
    if raw[-_SEAL_LENGTH:] != _seal(body):
        raise DamageFound(f"{path} does not match its checksum")
    document: dict[str, Any] = orjson.loads(body)
    return document


def _seal(body: bytes) -> bytes:
    return _OPENING + xxhash.xxh3_128_hexdigest(body).encode() + _CLOSING


def hash_file(path: Path) -> tuple[int, str]:
    """Read a file through: its length and xxh3_128."""
    length, digest = 0, xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
            length += len(piece)
    return length, digest.hexdigest()

"""JSON documents whose last member, `checksum`, is the xxh3_128 of the same document without it.

The spelling is fixed: members in the order they were given, indented by 2, a newline at the end. So equal documents
are equal bytes, and a checksum is tested on the bytes as they lie there.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import xxhash

from m3cli.errors import DamageFound, OutputError

_OPENING = b',\n  "checksum": "'
_CLOSING = b'"\n}\n'
_SEAL_LENGTH = len(_OPENING) + 32 + len(_CLOSING)
_END = b"\n}\n"


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Tell a disk that lost the bytes (damage) from a reader who may not have them (an OutputError)."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise OutputError(f"cannot read {path}: {error.strerror}; check it as who may read it") from error
        raise DamageFound(f"{path} cannot be read: {error.strerror or error}") from error


def seal_json(document: dict[str, Any]) -> bytes:
    """Spell a document of at least one member out, its checksum last."""
    body = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return body[: -len(_END)] + _seal(body)


def read_json(path: Path) -> dict[str, Any]:
    """Read a document and take its checksum off; a file that does not match it raises DamageFound."""
    with read_errors(path):
        raw = path.read_bytes()
    body = raw[:-_SEAL_LENGTH] + _END
    if raw[-_SEAL_LENGTH:] != _seal(body):
        raise DamageFound(f"{path} does not match its checksum")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise DamageFound(f"{path} is not a JSON object")
    return document


def _seal(body: bytes) -> bytes:
    return _OPENING + xxhash.xxh3_128_hexdigest(body).encode() + _CLOSING


def hash_file(path: Path) -> tuple[int, str]:
    """Read a file through: its length and xxh3_128."""
    length, digest = 0, xxhash.xxh3_128()
    with read_errors(path), path.open("rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
            length += len(piece)
    return length, digest.hexdigest()

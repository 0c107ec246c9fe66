"""JSON documents of a folder; the last member, `checksum`, is the xxh3_128 of the document without it.

The format is fixed: members in insertion order, indented by 2, a newline at the end. Equal documents are therefore
equal bytes, and a checksum is compared with the bytes of the file.
"""

from __future__ import annotations

import errno
import os
import shlex
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import orjson
import pyarrow as pa
import xxhash

import m3cli
from m3cli.config import RunConfig
from m3cli.errors import LOST, DamageFound, ForeignFolder, OutputError
from m3cli.paths import exists, is_folder
from m3cli.records import Between, DoneEntry, Manifest, ShardCounts
from m3cli.store.layout import (
    DATA_NAMES,
    DONE_FOLDER,
    FORMAT_VERSION,
    LOCK_NAME,
    MANIFEST_NAME,
    META,
    RUN_NAME,
    SHARD_FOLDERS,
    TMP_FOLDER,
    done_name,
    is_meta_name,
    rows_name,
    shard_of,
)

_OPENING = b',\n  "checksum": "'
_CLOSING = b'"\n}\n'
_CHECKSUM_LENGTH = len(_OPENING) + 32 + len(_CLOSING)
_END = b"\n}\n"


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into DamageFound, or into OutputError if the file is not readable by this user."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise OutputError(f"cannot read {path}: {error.strerror}; run m3 as a user who may read it") from error
        raise_if_lost(error, path)
        raise DamageFound(f"{path} cannot be read: {error.strerror or error}") from error


def raise_if_lost(error: Exception, path: Path) -> None:
    """Raise OutputError if an error is of a mount that is away: nothing on it is damaged, nor to be removed."""
    if isinstance(error, OSError) and error.errno in LOST:
        reason = error.strerror or error
        raise OutputError(f"cannot read {path}: {reason}; run the same command again once it is back") from error


def dumps_with_checksum(document: dict[str, Any]) -> bytes:
    """Serialise a document of at least one member and append its checksum."""
    body = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return body[: -len(_END)] + _checksum_member(body)


def read_json(path: Path) -> dict[str, Any]:
    """Read a document without its checksum; a mismatch raises DamageFound."""
    with read_errors(path):
        raw = path.read_bytes()
    body = raw[:-_CHECKSUM_LENGTH] + _END
    if raw[-_CHECKSUM_LENGTH:] != _checksum_member(body):
        raise DamageFound(f"{path} does not match its checksum")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise DamageFound(f"{path} is not a JSON object")
    return document


def _checksum_member(body: bytes) -> bytes:
    return _OPENING + xxhash.xxh3_128_hexdigest(body).encode() + _CLOSING


def hash_file(path: Path) -> tuple[int, str]:
    """Return the length and xxh3_128 of a file."""
    length, digest = 0, xxhash.xxh3_128()
    with read_errors(path), path.open("rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
            length += len(piece)
    return length, digest.hexdigest()


T = TypeVar("T")
_WORDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
_SHOWN = 60


class _Mismatch(Exception):
    """A value that does not match its type hint, and the path to it."""

    def __init__(self, words: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(words)
        self.words = words
        self.path = path


def parse_record(kind: type[T], value: object, *, name: str) -> T:
    """Build a dataclass from a JSON value.

    Supported types: dataclasses, tuple[X, ...], dict[str, X], X | None, Literal, str, bool, int, float, and numbers
    annotated with Between. A boolean is not an integer. Every member is required, also one with a default.

    Args:
        kind: the dataclass.
        value: the result of `orjson.loads`.
        name: the file's name, for the message.

    Raises:
        DamageFound: the value does not match; the message names the member.
    """
    try:
        record: T = _parser_of(cast("Any", kind))(value)
    except _Mismatch as mismatch:
        member = ".".join(mismatch.path).replace(".[", "[") or "the document"
        raise DamageFound(f"{name} is not what m3 writes: {member} {mismatch.words}") from mismatch
    return record


@cache
def _parser_of(hint: Any) -> Callable[[Any], Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _parse_members_of(hint)
    if origin is Annotated:
        return _parse_between(arguments[0], arguments[1])
    if origin in (Union, UnionType):
        return _parse_optional(*(argument for argument in arguments if argument is not NoneType))
    if origin is Literal:
        return _parse_literal(arguments)
    if origin in (tuple, dict):
        return _parse_items(arguments[0]) if origin is tuple else _parse_values(arguments[1])
    return _parse_plain(hint)


def _parse_members_of(kind: Any) -> Callable[[Any], Any]:
    parsers = {name: _parser_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}

    def parse(value: Any) -> Any:
        if type(value) is not dict:
            raise _mismatch(value, "an object")
        if value.keys() != parsers.keys():
            missing = [name for name in parsers if name not in value]
            name = missing[0] if missing else next(name for name in value if name not in parsers)
            raise _Mismatch("is missing" if missing else "is a member that this m3 does not know", (name,))
        return kind(**{name: _descend(parsers[name], value[name], name) for name in parsers})

    return parse


def _parse_items(hint: Any) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        if type(value) is not list:
            raise _mismatch(value, "a list")
        return tuple([_descend(parser, item, f"[{index}]") for index, item in enumerate(value)])

    return parse


def _parse_values(hint: Any) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        if type(value) is not dict:
            raise _mismatch(value, "an object")
        return {name: _descend(parser, item, name) for name, item in value.items()}

    return parse


def _parse_optional(hint: Any) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        return None if value is None else parser(value)

    return parse


def _parse_literal(choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if type(value) is not str or value not in choices:
            raise _mismatch(value, f"one of {', '.join(map(str, choices))}")
        return value

    return parse


def _parse_between(hint: Any, bounds: Between) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        if not bounds.least <= parser(value) <= bounds.most:
            raise _mismatch(value, f"a number from {bounds.least} to {bounds.most}")
        return value

    return parse


def _parse_plain(hint: Any) -> Callable[[Any], Any]:
    kinds = (int, float) if hint is float else (hint,)

    def parse(value: Any) -> Any:
        if type(value) not in kinds:
            raise _mismatch(value, _WORDS[hint])
        return value

    return parse


def _descend(parser: Callable[[Any], Any], value: Any, name: str) -> Any:
    try:
        return parser(value)
    except _Mismatch as mismatch:
        raise _Mismatch(mismatch.words, (name, *mismatch.path)) from None


def _mismatch(value: object, expected: str) -> _Mismatch:
    found = orjson.dumps(value).decode()
    return _Mismatch(f"is {found if len(found) <= _SHOWN else found[:_SHOWN] + '...'}, expected {expected}")


def run_document(run: RunConfig) -> dict[str, Any]:
    """Return the content of run.json."""
    return {"format_version": FORMAT_VERSION, **run.to_json()}


def entry_document(entry: DoneEntry) -> dict[str, Any]:
    """Return the content of a done entry's file."""
    return {"format_version": FORMAT_VERSION, **asdict(entry)}


def read_entry(path: Path) -> DoneEntry:
    """Read a done entry; damage raises DamageFound."""
    entry = parse_record(DoneEntry, _read_document(path), name=str(path))
    index = entry.shard.index
    names = [record.name for record in entry.files]
    strange = sorted(set(names) - {name(index) for name in DATA_NAMES})
    if strange or len(set(names)) != len(names) or rows_name(index) not in names:
        what = f"names {strange[0]!r}" if strange else f"names {rows_name(index)} not once, or another file twice"
        raise DamageFound(f"{path} {what}, which no entry of shard {index} does")
    return entry


def manifest_document(entries: Iterable[DoneEntry], *, run_hash: str, done_hashes: list[str]) -> dict[str, Any]:
    """Return the content of the manifest."""
    counts, length = ShardCounts(), 0
    for entry in entries:
        counts += entry.counts
        length += sum(record.length for record in entry.files)
    return {
        "format_version": FORMAT_VERSION,
        "num_shards": len(done_hashes),
        "counts": asdict(counts),
        "length": length,
        "run": run_hash,
        "done": done_hashes,
    }


def read_run(root: Path) -> RunConfig | None:
    """Read run.json, None if there is none; damage raises DamageFound.

    Raises:
        ForeignFolder: another version of m3cli wrote it, with other members.
    """
    path = root / RUN_NAME
    if not exists(path):
        return None
    document = _read_document(path)
    version, fingerprint = document.get("m3cli_version"), document.pop("fingerprint", None)
    try:
        run = parse_record(RunConfig, document, name=str(path))
        if fingerprint != run.fingerprint:
            raise DamageFound(f"{path} is not what m3 writes: fingerprint is not that of its members")
    except DamageFound as damage:
        if not isinstance(version, str) or version == m3cli.__version__:
            raise
        raise ForeignFolder(
            f"{path} was written by m3cli {version[:20]}, and {m3cli.__version__} cannot read it; "
            "use the version that began the folder, or use another --out"
        ) from damage
    return run


def read_manifest(root: Path) -> Manifest | None:
    """Read the manifest, None if there is none; damage, or a run.json of another hash, raises DamageFound."""
    path = root / MANIFEST_NAME
    if not exists(path):
        return None
    manifest = parse_manifest(path)
    if not exists(root / RUN_NAME):
        raise DamageFound(f"{root / RUN_NAME} is missing")
    if manifest.run != hash_file(root / RUN_NAME)[1]:
        raise DamageFound(f"{root / RUN_NAME} is not the one that {MANIFEST_NAME} was written for")
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """Read a manifest without comparing it with run.json; damage raises DamageFound."""
    manifest = parse_record(Manifest, _read_document(path), name=str(path))
    if len(manifest.done) != manifest.num_shards:
        raise DamageFound(f"{path} counts {manifest.num_shards} shards and lists {len(manifest.done)}")
    return manifest


def _read_document(path: Path) -> dict[str, Any]:
    """Read a document of this format version, without `format_version` and `checksum`."""
    document = read_json(path)
    version = document.pop("format_version", None)
    if type(version) is not int:
        raise DamageFound(f"{path} is not what m3 writes: it has no format_version")
    if version != FORMAT_VERSION:
        raise ForeignFolder(
            f"{path} has format version {version}, this m3 knows {FORMAT_VERSION}: use the m3cli that wrote the folder"
        )
    return document


def read_entries(root: Path) -> tuple[dict[int, DoneEntry], list[str]]:
    """Read all done entries by shard number; also return a message for each invalid one."""
    entries: dict[int, DoneEntry] = {}
    faults: list[str] = []
    folder = root / DONE_FOLDER
    for path in (folder / name for name in _list_names(folder)):
        if shard_of(f"{DONE_FOLDER}/{path.name}") is None:
            continue  # not a file of m3; `m3 check` lists it
        try:
            entry = read_entry(path)
        except DamageFound as damage:
            faults.append(str(damage))
            continue
        if root / done_name(entry.shard.index) == path:
            entries[entry.shard.index] = entry
        else:
            faults.append(f"{path} is the entry of shard {entry.shard.index}")
    return entries, faults


def list_done(root: Path) -> set[int]:
    """Return the shards that have an entry, by its name."""
    shards = (shard_of(f"{DONE_FOLDER}/{name}") for name in _list_names(root / DONE_FOLDER))
    return {shard for shard in shards if shard is not None}


def read_metrics(root: Path) -> dict[str, Any] | None:
    """Add up the metrics of all workers, and of a run without workers; None: there are none.

    Rates and seconds are added too; of peaks the highest is taken. `runs` is their number.
    """
    total: dict[str, Any] = {"runs": 0}
    for path in sorted((root / META).glob("metrics.*json")):
        try:
            each = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue  # only for people; it is replaced by the next run
        # The sum that the last worker wrote has `runs`; damage may have left anything.
        if not isinstance(each, dict) or "runs" in each or not _has_rate(each):
            continue
        total["runs"] += 1
        for name, value in each.items():
            before = total.get(name)
            if isinstance(value, dict) and isinstance(before, (dict, type(None))):
                sums = Counter(before or {})
                sums.update({key: number for key, number in value.items() if isinstance(number, (int, float))})
                total[name] = dict(sums)
            elif isinstance(value, (int, float)) and isinstance(before, (int, float, type(None))):
                total[name] = max(before or 0, value) if name.startswith("peak") else (before or 0) + value
            elif isinstance(value, str):
                total[name] = value
    return total if total["runs"] else None


def _has_rate(metrics: dict[str, Any]) -> bool:
    """Whether the numbers that are shown are numbers."""
    seconds = metrics.get("seconds")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    return all(isinstance(each, (int, float)) for each in (metrics.get("tokens_per_second"), total))


def find_misplaced(entries: Mapping[int, DoneEntry], run: RunConfig) -> list[int]:
    """Return the shards whose source is not in run.json."""
    return [index for index, entry in entries.items() if entry.shard.source >= len(run.sources)]


def list_wrong_lengths(root: Path, entries: Iterable[DoneEntry]) -> Iterator[str]:
    """Yield a message for each file that is missing or of another length; contents are not read."""
    for entry in entries:
        for record in entry.files:
            path = root / record.name
            try:
                length = path.stat().st_size
            except OSError as error:
                raise_if_lost(error, path)
                missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
                yield f"{path} is missing" if missing else f"{path} cannot be read: {error.strerror or error}"
                continue
            if length != record.length:
                yield f"{path} has {length:,} bytes where {record.length:,} were written"


def is_ours(root: Path) -> bool:
    """Whether the folder is an output folder: `_m3` has a lock or run.json, or `_m3` is empty and the only entry."""
    meta = root / META
    if not is_folder(meta):
        return False
    return exists(root / LOCK_NAME) or exists(root / RUN_NAME) or list(root.iterdir()) == [meta]


def find_links(root: Path) -> Iterator[str]:
    """Yield the symbolic links that have names of m3's files and folders.

    m3 creates no links. They may point anywhere, so m3 writes and deletes nothing through them.
    """
    for folder in (META, TMP_FOLDER, *SHARD_FOLDERS):
        if (root / folder).is_symlink():
            yield folder
        for name in _list_names(root / folder, links=True):
            if is_meta_name(f"{folder}/{name}") or shard_of(f"{folder}/{name}") is not None:
                yield f"{folder}/{name}"


def _list_names(folder: Path, *, links: bool = False) -> list[str]:
    if not is_folder(folder):
        return []
    with os.scandir(folder) as listing:
        return sorted(item.name for item in listing if not links or item.is_symlink())


UNREADABLE = (
    *(pa.ArrowException, OSError, ValueError, KeyError, IndexError, EOFError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"exceptions of pyarrow and NumPy for a corrupt file"


def name_check(root: Path) -> str:
    """Return what to do about a damaged folder."""
    return f"'m3 check {shlex.quote(str(root))}' lists all damage"


def name_repair(root: Path) -> str:
    """Return what to do about damaged files of a shard."""
    return f"{name_check(root)}, with --repair the next m3 encode makes it again"


@contextmanager
def reading(root: Path, index: int) -> Iterator[None]:
    """Turn the errors of reading a shard's files into DamageFound."""
    try:
        yield
    except UNREADABLE as error:
        raise_if_lost(error, root)
        reason = str(error).strip().partition("\n")[0]
        raise DamageFound(f"{root}: shard {index} cannot be read: {reason}; {name_repair(root)}") from error

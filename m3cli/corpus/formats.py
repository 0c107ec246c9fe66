"""Which format and compression a source has: by its ending, held against its first bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePath
from typing import get_args

from m3cli.corpus.lines import BOM
from m3cli.corpus.streams import PeekableStream, name_faults, read_head
from m3cli.errors import CorpusError, UsageError
from m3cli.records import Compression, Source, SourceFormat

FORMATS: dict[str, SourceFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
REMEDIES = {
    ".csv": "CSV is not read, for its quoting: convert it to JSONL or Parquet "
    "(duckdb -c \"COPY (FROM 'in.csv') TO 'out.jsonl'\")",
    ".xz": "decompress it and pipe it in (xz -dc FILE | m3 encode - --out DIR)",
    ".bz2": "decompress it and pipe it in (bzip2 -dc FILE | m3 encode - --out DIR)",
    ".zip": "unpack it first",
}
HEAD_BYTES = 4096
_MANY_NULS = 16
"more than that at even places only, or at odd ones, are no accident"
_PARQUET_MAGIC = b"PAR1"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"a frame, or a skippable one as pzstd writes first"
_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_JSON_ARRAY = re.compile(rb"\s*\[\s*\{")


def check_input_format(input_format: str) -> SourceFormat | None:
    """Return the format that was asked for, None for 'auto'."""
    if input_format == "auto":
        return None
    for known in get_args(SourceFormat):
        if input_format == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(f"--input-format {input_format}: it is one of auto, {', '.join(get_args(SourceFormat))}")


def split_endings(name: str) -> tuple[str, Compression]:
    """Return the ending that tells the format, and the compression that the last one promises."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix, "none")
    return (path.suffix if compression == "none" else PurePath(path.stem).suffix), compression


def name_endings(name: str) -> str:
    """Return the ending as it is shown, with that of the compression: '.md', '.csv.gz', '' for none."""
    ending, compression = split_endings(name)
    return ending if compression == "none" else ending + PurePath(name.lower()).suffix


def has_known_ending(name: str) -> bool:
    """Whether a file found in a folder is taken."""
    ending, compression = split_endings(name)
    return ending in FORMATS and not (FORMATS[ending] == "parquet" and compression != "none")


def identify(
    source: Source,
    *,
    forced: SourceFormat | None,
    stdin: PeekableStream | None = None,
    flag: str | None = "--input-format",
) -> Source:
    """Return the source with its format and compression; refuse what cannot be read, or is not what it is called.

    `flag` is for messages: what forces a format, None where nothing does.
    """
    magic = _read_magic(source, stdin)
    ending, promised = split_endings(source.path)
    wanted = forced or FORMATS.get(ending)
    if forced is None and ending in REMEDIES:
        forcing = f", or say {flag} tsv if it is tab-separated" if flag and ending == ".csv" else ""
        raise CorpusError(f"{source.name}: {REMEDIES[ending]}{forcing}")
    if magic.startswith(_PARQUET_MAGIC) or wanted == "parquet":
        return _identify_parquet(source, magic, wanted)
    compression = _name_compression(magic)
    if source.path != "-" and magic and promised != compression:
        _refuse_ending(source, promised, compression)
    source = replace(source, compression=compression if magic else promised)
    head = read_head(source, HEAD_BYTES, stdin=stdin)
    encoding = find_wide_encoding(head)
    if encoding is not None:
        marked = "" if encoding in _BOMS.values() else " without a byte order mark"
        raise CorpusError(f"{source.name} is {encoding}{marked}: convert it with iconv -f {encoding} -t UTF-8")
    found = wanted or _sniff(source, head, flag)
    head = head.removeprefix(BOM)
    if found == "jsonl" and (_JSON_ARRAY.match(head) or (ending == ".json" and head.lstrip().startswith(b"["))):
        raise CorpusError(
            f"{source.name} is one JSON array, not a JSON object a line: convert it with jq -c '.[]' IN > OUT.jsonl"
        )
    return replace(source, format=found)


def find_wide_encoding(head: bytes) -> str | None:
    """Return the name of UTF-16 or UTF-32, by the byte order mark or by where NULs are; None for anything else.

    UTF-8 has a NUL only for a NUL, the others have one or more for each letter of Latin script, blank and line break.
    """
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    num_units = len(head) // 4
    zeros = [head[place : num_units * 4 : 4].count(0) for place in range(4)]
    if min(zeros[2:]) == num_units > zeros[0]:
        return "UTF-32LE"
    if min(zeros[:2]) == num_units > zeros[3]:
        return "UTF-32BE"
    for name, many, none in (("UTF-16LE", head[1::2], head[::2]), ("UTF-16BE", head[::2], head[1::2])):
        found = many.count(0)
        enough = found * 2 > len(many) if found < _MANY_NULS else found * 20 > len(many)
        if found >= 2 and enough and 0 not in none:
            return name
    return None


def _read_magic(source: Source, stdin: PeekableStream | None) -> bytes:
    return read_head(replace(source, compression="none"), 8, stdin=stdin)


def _name_compression(magic: bytes) -> Compression:
    if magic.startswith(_GZIP_MAGIC):
        return "gzip"
    return "zstd" if _ZSTD_MAGIC.match(magic) else "none"


def _refuse_ending(source: Source, promised: Compression, found: Compression) -> None:
    if promised == "none":
        ending = ".gz" if found == "gzip" else ".zst"
        raise CorpusError(f"{source.name} is {found} data but its name does not say so: add {ending} to its name")
    is_what = "not compressed" if found == "none" else f"{found} data"
    raise CorpusError(f"{source.name} is called {promised} by its ending but is {is_what}: rename it")


def _identify_parquet(source: Source, magic: bytes, wanted: SourceFormat | None) -> Source:
    if source.path == "-":
        raise CorpusError("Parquet cannot be read from standard input: give the file's name instead")
    if not magic.startswith(_PARQUET_MAGIC):
        found = _name_compression(magic)
        is_what = "empty" if not magic else "no Parquet file" if found == "none" else f"{found} data"
        raise CorpusError(f"{source.name} should be Parquet but is {is_what}: write it again, or rename it")
    if wanted not in {None, "parquet"}:
        raise CorpusError(f"{source.name} is Parquet but should be {wanted}: rename it to end in .parquet")
    return replace(source, format="parquet", compression="none")


def _sniff(source: Source, head: bytes, flag: str | None) -> SourceFormat:
    body = head.removeprefix(BOM)
    if body.lstrip().startswith(b"{") or _JSON_ARRAY.match(body):
        return "jsonl"
    with name_faults(source):
        try:
            head.decode()
        except UnicodeDecodeError as error:
            # A character that the head's end cuts in two is no fault.
            if error.end < len(head) or len(head) < HEAD_BYTES or error.start < len(head) - 3:
                forcing = f", or say what it is with {flag} jsonl|tsv|text|parquet" if flag else ""
                raise CorpusError(f"{source.name} is neither JSONL nor text in UTF-8: convert it{forcing}") from error
    return "text"

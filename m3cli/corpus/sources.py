"""Find the input files, with format and compression by their endings, checked by their first bytes."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import get_args

from m3cli.corpus.files import (
    TEXT_ENDINGS,
    is_text_file,
    is_written_by_m3,
    list_text_files,
    stat_file,
    version_of,
    walk,
)
from m3cli.corpus.remote import is_remote, list_objects
from m3cli.corpus.streams import BOM, PeekableStream, corpus_errors, read_head, read_size_and_mtime
from m3cli.errors import CorpusError, UsageError, check_reachable
from m3cli.records import COLUMNAR, Compression, Source, SourceFormat

FORMATS: dict[str, SourceFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
REMEDIES = {
    ".xz": "decompress it and pipe it in (xz -dc FILE | m3 encode - --out DIR)",
    ".bz2": "decompress it and pipe it in (bzip2 -dc FILE | m3 encode - --out DIR)",
    ".zip": "unpack it first",
}
HEAD_BYTES = 4096
_MANY_NULS = 16
"more than this at even offsets only, or at odd ones, mean UTF-16"
_MAGICS: dict[SourceFormat, tuple[bytes, ...]] = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
"of Arrow the file format, which Feather is, and the stream format, which datasets.save_to_disk writes"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"a frame, or a skippable one as pzstd writes first"
_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_JSON_ARRAY = re.compile(rb"\s*\[\s*\{")


def check_input_format(input_format: str) -> SourceFormat | None:
    """Return the format, None for 'auto'."""
    if input_format == "auto":
        return None
    for known in get_args(SourceFormat):
        if input_format == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(f"--input-format {input_format}: it is one of auto, {', '.join(get_args(SourceFormat))}")


def split_endings(name: str) -> tuple[str, Compression]:
    """Return the ending of the format, and the compression of the last ending."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix, "none")
    return (path.suffix if compression == "none" else PurePath(path.stem).suffix), compression


def name_endings(name: str) -> str:
    """Return the complete ending: '.md', '.csv.gz', '' for none."""
    ending, compression = split_endings(name)
    return ending if compression == "none" else ending + PurePath(name.lower()).suffix


def has_known_ending(name: str) -> bool:
    """Return whether a file in a folder is part of the input."""
    ending, compression = split_endings(name)
    return ending in FORMATS and not (FORMATS[ending] in COLUMNAR and compression != "none")


def identify(
    source: Source,
    *,
    forced: SourceFormat | None,
    stdin: PeekableStream | None = None,
    flag: str | None = "--input-format",
) -> Source:
    """Return the source with its format and compression; raise CorpusError if it cannot be read or its name is wrong.

    `flag` is the option that forces a format, for messages; None: there is no such option.
    """
    magic = _read_magic(source, stdin)
    ending, promised = split_endings(source.path)
    wanted = forced or FORMATS.get(ending)
    if forced is None and ending in REMEDIES:
        raise CorpusError(f"{source.name}: {REMEDIES[ending]}")
    columnar = next((name for name in COLUMNAR if magic.startswith(_MAGICS[name])), None)
    if columnar or wanted in COLUMNAR:
        return _identify_columns(source, magic, wanted, columnar)
    compression = _name_compression(magic)
    if source.path != "-" and magic and promised != compression:
        _check_ending(source, promised, compression)
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
    """Return the name of UTF-16 or UTF-32, by the byte order mark or by the offsets of NULs; None for anything else.

    UTF-8 has a NUL only for a NUL, the others have NULs for each Latin letter, blank and line break.
    """
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    num_units = len(head) // 4
    zeros = [head[offset : num_units * 4 : 4].count(0) for offset in range(4)]
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


def _check_ending(source: Source, promised: Compression, found: Compression) -> None:
    if promised == "none":
        ending = ".gz" if found == "gzip" else ".zst"
        raise CorpusError(f"{source.name} is {found} data without the ending of it: add {ending} to its name")
    is_what = "not compressed" if found == "none" else f"{found} data"
    raise CorpusError(f"{source.name} is called {promised} by its ending but is {is_what}: rename it")


def _identify_columns(source: Source, magic: bytes, wanted: SourceFormat | None, found: SourceFormat | None) -> Source:
    """Return the source as Parquet or Arrow; `wanted` is what it should be, `found` what its first bytes say."""
    name = (found or wanted or "").capitalize()
    if source.path == "-":
        raise CorpusError(f"{name} cannot be read from standard input: give the file's name instead")
    if found is None:
        compression = _name_compression(magic)
        is_what = "empty" if not magic else f"not {name}" if compression == "none" else f"{compression} data"
        raise CorpusError(f"{source.name} should be {name} but is {is_what}: write it again, or rename it")
    if wanted not in {None, found}:
        raise CorpusError(f"{source.name} is {name} but should be {wanted}: rename it to end in .{found}")
    return replace(source, format=found, compression="none")


def _sniff(source: Source, head: bytes, flag: str | None) -> SourceFormat:
    body = head.removeprefix(BOM)
    if body.lstrip().startswith(b"{") or _JSON_ARRAY.match(body):
        return "jsonl"
    with corpus_errors(source):
        try:
            head.decode()
        except UnicodeDecodeError as error:
            # The end of the head may cut a character.
            if error.end < len(head) or len(head) < HEAD_BYTES or error.start < len(head) - 3:
                forcing = f", or name its format with {flag} {'|'.join(get_args(SourceFormat))}" if flag else ""
                raise CorpusError(f"{source.name} is neither JSONL nor text in UTF-8: convert it{forcing}") from error
    return "text"


ENDINGS_HINT = (
    "files ending in .jsonl .ndjson .json .csv .tsv .txt .text (also + .gz .zst) .parquet .pq .arrow .feather are read"
)
_COPYING = {
    "hf": "hf download",
    "http": "curl -LO",
    "https": "curl -LO",
}
"commands that copy files, by the scheme of an address"


def find_sources(
    inputs: Sequence[str],
    *,
    input_format: str = "auto",
    stdin: PeekableStream | None = None,
    format_flag: str | None = "--input-format",
    own: Collection[str] = (),
) -> tuple[Source, ...]:
    """Return the sources of the inputs; standard input is only peeked at.

    Args:
        inputs: paths and globs, or addresses of objects, folders and globs in buckets, or '-' alone.
        input_format: a format, or 'auto'.
        stdin: standard input, if it is an input.
        format_flag: option that forces a format, for messages; None: there is none.
        own: real paths of files that the run writes, which are not read.

    Raises:
        UsageError: no input, a duplicate, or an address of another machine that is not s3:// or gs://.
        CorpusError: an input cannot be read.
    """
    forced = check_input_format(input_format)
    if not inputs:
        raise UsageError("no input: give files, folders or globs, or '-' for standard input")
    if forced == "files":
        return (_find_folder(inputs, own),)
    if any(map(is_remote, inputs)):
        return _find_objects(inputs, forced, format_flag)
    for each in inputs:
        check_local_input(each)
    if "-" in inputs:
        return (_find_stdin(inputs, forced, stdin, format_flag),)
    found = [(path, root) for each in inputs for path, root in _find_files(each) if os.path.realpath(path) not in own]
    if not found:
        raise CorpusError(f"{' '.join(inputs)}: only files that this run writes; give the corpus")
    _check_duplicates([path for path, _ in found])
    common = Path(os.path.commonpath([root for _, root in found]))
    sources = tuple(_open_source(path, path.relative_to(common).as_posix(), forced, format_flag) for path, _ in found)
    return _check_any_bytes(sources, inputs)


def _find_folder(inputs: Sequence[str], own: Collection[str]) -> Source:
    """Return a folder as one source, of which each text file is a document."""
    folder = Path(os.path.abspath(inputs[0]))  # noqa: PTH100 -- Path.resolve would follow links
    if len(inputs) > 1 or is_remote(inputs[0]) or not folder.is_dir():
        raise UsageError(f"--per-file takes one folder of this machine, not {' '.join(inputs)[:200]}: name that folder")
    if is_written_by_m3(folder):
        raise CorpusError(f"{inputs[0]} is a folder that m3 writes: give the corpus")
    files = list_text_files(str(folder))
    if own and (written := next((file.path for file in files if os.path.realpath(folder / file.path) in own), None)):
        raise UsageError(f"this run writes {folder / written}, which --per-file would read: write it elsewhere")
    if not files:
        raise CorpusError(f"{inputs[0]}: nothing to read in this folder; --per-file reads {' '.join(TEXT_ENDINGS)}")
    size, mtime_ns = version_of(files)
    source = Source(
        name=folder.name, path=str(folder), format="files", compression="none", size=size, mtime_ns=mtime_ns
    )
    return _check_any_bytes((source,), inputs)[0]


def _check_any_bytes(sources: tuple[Source, ...], inputs: Sequence[str]) -> tuple[Source, ...]:
    if not any(source.size for source in sources):
        raise CorpusError(f"{' '.join(inputs)}: nothing to encode, only empty files")
    return sources


def check_local_input(name: str) -> None:
    """Check that an input is not an address of another machine.

    Raises:
        UsageError: it is.
    """
    if address := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name):
        copying = _COPYING.get(address[1].lower())
        example = f", for example with {copying}" if copying else ""
        raise UsageError(f"{name}: m3 reads local files; copy it here first{example}")


def count_unread(inputs: Sequence[str], input_format: str = "auto") -> dict[str, int]:
    """Count the files of folders and globs that are not read, by ending, most frequent first."""
    is_read = is_text_file if input_format == "files" else has_known_ending
    paths: set[str] = set()
    for name in inputs:
        if is_remote(name):
            paths.update(path for path in list_objects(name)[0] if not is_read(path))
        elif Path(name).is_dir():
            paths.update(os.path.realpath(path) for path in walk(name) if not is_read(path))
        elif glob.has_magic(name) and not Path(name).exists():
            paths.update(os.path.realpath(path) for path in _match(name)[0] if not is_read(path.name))
    endings = Counter(name_endings(path) or "without ending" for path in paths)
    return dict(sorted(endings.items(), key=lambda item: (-item[1], item[0])))


def list_files(name: str) -> list[Path]:
    """Return the files that an input may have; none if it is invalid, which `find_sources` reports."""
    try:
        if Path(name).is_dir():
            return [Path(path) for path in walk(name) if has_known_ending(path) or is_text_file(path)]
        return [path for path, _ in _find_files(name)]
    except (CorpusError, OSError):
        return []


def _find_stdin(
    inputs: Sequence[str], forced: SourceFormat | None, stdin: PeekableStream | None, flag: str | None
) -> Source:
    if len(inputs) > 1:
        raise UsageError("'-' (standard input) must be the only input")
    assert stdin is not None, "stdin is missing"
    if not stdin.peek(1):
        raise CorpusError("standard input is empty: check the command that writes it")
    source = Source(name="stdin", path="-", format="text", compression="none", size=-1, mtime_ns=-1)
    return identify(source, forced=forced, stdin=stdin, flag=flag)


def _find_objects(inputs: Sequence[str], forced: SourceFormat | None, flag: str | None) -> tuple[Source, ...]:
    """Return the sources of inputs in buckets."""
    if (other := next((each for each in inputs if not is_remote(each)), None)) is not None:
        raise UsageError(f"{other}: the other inputs are in a bucket; encode local files in a run of their own")
    found: list[tuple[str, str]] = []
    for each in inputs:
        paths, root = list_objects(each)
        read = [path for path in paths if path == each or has_known_ending(path)]
        if not read:
            what = "no object of these can be read" if paths else "there is no object"
            raise CorpusError(f"{each}: {what}; {ENDINGS_HINT}")
        found += [(path, root) for path in read]
    for path, count in Counter(path for path, _ in found).items():
        if count > 1:
            raise UsageError(f"{path} is among the inputs twice: name it once")
    common = os.path.commonpath([root.partition("//")[2] for _, root in found])
    sources = []
    for path, _ in found:
        source = Source(name=path, path=path, format="text", compression="none", size=0, mtime_ns=-1)
        with corpus_errors(source):
            size, mtime_ns = read_size_and_mtime(path)
        source = replace(source, name=path.partition("//")[2][len(common) :].lstrip("/"), size=size, mtime_ns=mtime_ns)
        sources.append(identify(source, forced=forced, flag=flag))
    return _check_any_bytes(tuple(sources), inputs)


def _find_files(name: str) -> list[tuple[Path, Path]]:
    """Return the files of one input, each with the folder that its name is relative to."""
    path = Path(os.path.abspath(name))  # noqa: PTH100 -- Path.resolve would follow links
    if not glob.has_magic(name):
        check_reachable(path, CorpusError)
    if path.is_dir():
        if is_written_by_m3(path):
            raise CorpusError(f"{name} is a folder that m3 writes: give the corpus")
        files = _skip_notes(Path(file) for file in walk(str(path)) if has_known_ending(file))
        found = sorted(files, key=lambda file: file.relative_to(path).as_posix())
        if not found:
            raise CorpusError(f"{name}: nothing to read in this folder; {_hint(path)}")
        return [(file, path) for file in found]
    if path.exists():
        return [(path, path.parent)]
    if glob.has_magic(name):
        return _expand(name)
    raise CorpusError(f"{name}: no such file or folder")


def _skip_notes(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files without what datasets.save_to_disk writes next to the data of a dataset."""
    data: dict[Path, set[str] | None] = {}
    for file in files:
        folder = file.parent
        if folder not in data:
            data[folder] = _read_data_files(folder)
        names = data[folder]
        if file.name in names if names is not None else file.name != "dataset_dict.json":
            yield file


def _read_data_files(folder: Path) -> set[str] | None:
    """Return the names of a dataset's files; None: the folder is no dataset."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return {each["filename"] for each in state["_data_files"]} if (folder / "dataset_info.json").exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _expand(pattern: str) -> list[tuple[Path, Path]]:
    matches, fixed = _match(pattern)
    found = [match for match in matches if has_known_ending(match.name)]
    if not found:
        what = "no match can be read" if matches or glob.glob(pattern, recursive=True) else "no file matches"  # noqa: PTH207
        raise CorpusError(f"{pattern}: {what}; {ENDINGS_HINT}")
    return [(match, fixed) for match in sorted(found, key=lambda match: match.relative_to(fixed).as_posix())]


def _match(pattern: str) -> tuple[list[Path], Path]:
    """Return the files that a glob matches, and the folder before its first wildcard."""
    fixed = Path(os.path.abspath(pattern))  # noqa: PTH100 -- as above
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    matches = [Path(os.path.abspath(match)) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH100, PTH207
    between = {match: [parent for parent in match.parents if parent.is_relative_to(fixed)][:-1] for match in matches}
    written = set(filter(is_written_by_m3, {folder for folders in between.values() for folder in folders}))
    return [match for match in matches if match.is_file() and written.isdisjoint(between[match])], fixed


def _hint(folder: Path) -> str:
    """Return the remedy of the first file that has one, or else the endings that are read."""
    for file in sorted(folder.iterdir()):
        remedy = REMEDIES.get(split_endings(file.name)[0])
        if remedy is not None:
            return f"{file.name}: {remedy}"
    if any(is_text_file(file.name) for file in folder.iterdir()):
        return f"{ENDINGS_HINT}; with --per-file each text file is a document"
    return ENDINGS_HINT


def _check_duplicates(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            also = "" if seen[real] == path else f" (also as {seen[real]})"
            raise UsageError(f"{path} is among the inputs twice{also}: name it once")
        seen[real] = path


def _open_source(path: Path, name: str, forced: SourceFormat | None, flag: str | None) -> Source:
    status = stat_file(path)
    source = Source(
        name=name,
        path=str(path),
        format="text",
        compression="none",
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )
    return identify(source, forced=forced, flag=flag)

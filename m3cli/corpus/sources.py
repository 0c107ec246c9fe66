"""Finds the input: files, folders, globs or standard input, in an order that depends on their names alone.

Folders and globs give files of known endings; hidden files and folders that m3 writes are skipped. A file that is named
itself may end as it likes. A source's name is its path below the folder that all inputs share.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from m3cli.corpus.formats import REMEDIES, check_input_format, has_known_ending, identify, split_endings
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import CorpusError, UsageError, is_utf8, refuse_unreachable
from m3cli.paths import is_output_folder
from m3cli.records import Source, SourceFormat

ENDINGS_HINT = "files ending in .jsonl .ndjson .json .tsv .txt .text (also + .gz .zst) .parquet .pq are read"


def find_sources(
    inputs: Sequence[str],
    *,
    input_format: str = "auto",
    stdin: PeekableStream | None = None,
    format_flag: str | None = "--input-format",
    own: Container[str] = (),
) -> tuple[Source, ...]:
    """Find what the inputs name; standard input is only peeked at.

    Args:
        inputs: paths, globs, or '-' alone.
        input_format: a format, or 'auto'.
        stdin: standard input, where it is wanted.
        format_flag: for messages: what forces a format, None where nothing does.
        own: real paths of files that the run writes itself, which are not read.

    Raises:
        UsageError: nothing, or one thing twice.
        CorpusError: something that cannot be read.
    """
    forced = check_input_format(input_format)
    if not inputs:
        raise UsageError("no input: give files, folders or globs, or '-' for standard input")
    if "-" in inputs:
        return (_find_stdin(inputs, forced, stdin, format_flag),)
    found = [(path, root) for each in inputs for path, root in _find_files(each) if os.path.realpath(path) not in own]
    if not found:
        raise CorpusError(f"{' '.join(inputs)}: nothing to read there but what this run writes; give the corpus itself")
    _refuse_duplicates([path for path, _ in found])
    common = Path(os.path.commonpath([root for _, root in found]))
    sources = tuple(_open_source(path, path.relative_to(common).as_posix(), forced, format_flag) for path, _ in found)
    if not any(source.size for source in sources):
        raise CorpusError(f"{' '.join(inputs)}: nothing to encode, only empty files")
    return sources


def list_files(given: str) -> list[Path]:
    """List the files that an input names; what is wrong with it `find_sources` tells."""
    try:
        return [path for path, _ in _find_files(given)]
    except (CorpusError, OSError):
        return []


def _find_stdin(
    inputs: Sequence[str], forced: SourceFormat | None, stdin: PeekableStream | None, flag: str | None
) -> Source:
    if len(inputs) > 1:
        raise UsageError("'-' (standard input) must be the only input")
    assert stdin is not None, "a run that reads standard input passes it along"
    if not stdin.peek(1):
        raise CorpusError("standard input is empty: there are no rows in it; look at what was to write them")
    source = Source(name="stdin", path="-", format="text", compression="none", size=-1, mtime_ns=-1)
    return identify(source, forced=forced, stdin=stdin, flag=flag)


def _find_files(given: str) -> list[tuple[Path, Path]]:
    """Return the files of one input, each with the folder that its name is relative to."""
    path = Path(os.path.abspath(given))  # noqa: PTH100 -- Path.resolve would follow links, and name another file
    if not glob.has_magic(given):
        refuse_unreachable(path, CorpusError)
    if path.is_dir():
        if _is_written_by_m3(path):
            raise CorpusError(f"{given} is a folder that m3 writes: give the corpus itself")
        found = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
        if not found:
            raise CorpusError(f"{given}: nothing to read in this folder; {_hint(path)}")
        return [(file, path) for file in found]
    if path.exists():
        return [(path, path.parent)]
    if glob.has_magic(given):
        return _expand(given)
    raise CorpusError(f"{given}: no such file or folder")


def _expand(pattern: str) -> list[tuple[Path, Path]]:
    fixed = Path(os.path.abspath(pattern))  # noqa: PTH100 -- as above
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    matches = [Path(os.path.abspath(match)) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH100, PTH207
    between = {match: [parent for parent in match.parents if parent.is_relative_to(fixed)][:-1] for match in matches}
    written = set(filter(_is_written_by_m3, {folder for folders in between.values() for folder in folders}))
    found = [
        match
        for match in matches
        if match.is_file() and has_known_ending(match.name) and written.isdisjoint(between[match])
    ]
    if not found:
        what = "no file matches" if not matches else "no match can be read"
        raise CorpusError(f"{pattern}: {what}; {ENDINGS_HINT}")
    return [(match, fixed) for match in sorted(found, key=lambda match: match.relative_to(fixed).as_posix())]


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [
            name for name in folders if not name.startswith(".") and not _is_written_by_m3(Path(parent, name))
        ]
        yield from (Path(parent, name) for name in files if not name.startswith(".") and has_known_ending(name))


def _is_written_by_m3(folder: Path) -> bool:
    return folder.suffix == ".m3" or is_output_folder(folder)


def _hint(folder: Path) -> str:
    """Return the remedy for the first file in the folder that has one of its own, or else the endings that are read."""
    for file in sorted(folder.iterdir()):
        remedy = REMEDIES.get(split_endings(file.name)[0])
        if remedy is not None:
            return f"{file.name}: {remedy}"
    return ENDINGS_HINT


def _refuse_duplicates(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            also = "" if seen[real] == path else f" (also as {seen[real]})"
            raise UsageError(f"{path} is among the inputs twice{also}: name it once")
        seen[real] = path


def _open_source(path: Path, name: str, forced: SourceFormat | None, flag: str | None) -> Source:
    if not is_utf8(str(path)):
        raise CorpusError(f"{path} has a name that is not UTF-8: rename it")
    try:
        status = path.stat()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorpusError(f"{path} is not a regular file: pipe it in, with '-' as the input")
    source = Source(
        name=name,
        path=str(path),
        format="text",
        compression="none",
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )
    return identify(source, forced=forced, flag=flag)

"""Folders: walking them, and a folder as one source of format `files`, in which each text file is a document.

The files are in the order of their paths. A file belongs to the k-th shard if its first byte, of all files one after
the other, is in [k * size, (k + 1) * size). HTML counts as the text of its page.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import accumulate, groupby, pairwise
from pathlib import Path, PurePath

import xxhash

from m3cli.corpus.rows import EMPTY_TEXT, Fault, Row, fault_decoding
from m3cli.errors import CorpusError, is_utf8
from m3cli.paths import is_output_folder

TEXT_ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst", ".html", ".htm")
FILE_FIELDS = ("id", "title", "text")
"of a document: the path relative to the folder, the file's name, and its text"
_INLINE = "a abbr b bdi bdo big cite code del em font i ins kbd mark q s small span strong sub sup u".split()  # noqa: SIM905
"tags within a line"
_HIDDEN = ("script", "style", "iframe", "noembed", "noframes")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """A file in a folder."""

    path: str
    "relative to the folder, with '/'"
    size: int
    mtime_ns: int


def walk(folder: str) -> Iterator[str]:
    """Yield the files of a folder, its subfolders and the targets of links, without hidden files and m3's own.

    Each folder is walked once, by its own name rather than a link's. Names are strings: there may be millions.
    """

    def fail(error: OSError) -> None:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error

    join, seen, waiting = os.path.join, set(), deque([folder])
    while waiting:
        for parent, folders, files in os.walk(waiting.popleft(), onerror=fail):
            status = Path(parent).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            visible = sorted(name for name in folders if not name.startswith("."))
            folders[:] = [name for name in visible if not is_written_by_m3(Path(parent, name))]
            links = (join(parent, name) for name in folders if os.path.islink(join(parent, name)))  # noqa: PTH114
            waiting.extend(link for link in links if not is_written_by_m3(Path(link).resolve()))
            yield from (join(parent, name) for name in files if not name.startswith("."))


def is_written_by_m3(folder: Path) -> bool:
    """Return whether a folder is an output folder, by its name or content."""
    return folder.suffix == ".m3" or is_output_folder(folder)


def is_text_file(name: str) -> bool:
    """Return whether a file is a document of its folder."""
    return name.lower().endswith(TEXT_ENDINGS)


def stat_file(path: str | Path) -> os.stat_result:
    """Return the status of a file to be read.

    Raises:
        CorpusError: it cannot be read, is not a regular file, or has a name that is not UTF-8.
    """
    if not is_utf8(str(path)):
        raise CorpusError(f"{path} has a name that is not UTF-8: rename it")
    try:
        status = os.stat(path)  # noqa: PTH116  strings are many times as fast
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CorpusError(f"{path} is not a regular file: pipe it in, with '-' as the input")
    return status


def list_text_files(folder: str) -> list[TextFile]:
    """Return the text files of a folder and its subfolders, in the order of their paths.

    Raises:
        CorpusError: a folder or file cannot be read, or a name is not UTF-8.
    """
    found, start = [], len(folder.rstrip("/")) + 1
    for path in filter(is_text_file, walk(folder)):
        status = stat_file(path)
        found.append(TextFile(path=path[start:], size=status.st_size, mtime_ns=status.st_mtime_ns))
    return sorted(found, key=lambda file: file.path)


def version_of(files: Sequence[TextFile]) -> tuple[int, int]:
    """Return the bytes of all files, and 60 bits of the hash of their paths, sizes and dates."""
    digest = xxhash.xxh3_64()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\n".encode())
    return sum(file.size for file in files), digest.intdigest() >> 4


def cut_files(files: Sequence[TextFile], *, shard_size: int) -> list[tuple[int, int]]:
    """Return the first file, and the one after the last, of each shard."""
    begins = accumulate((file.size for file in files[:-1]), initial=0)
    counts = [len(list(group)) for _, group in groupby(begins, key=lambda begin: begin // shard_size)] if files else []
    ends = list(accumulate(counts, initial=0))
    return list(pairwise(ends))


def parse_file(path: str, raw: bytes) -> Row | Fault:
    """Return the row of a file, with its bytes."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = fault_decoding(error)
        return Fault(reason=fault.reason, detail=f"{path}: {fault.detail}")
    if PurePath(path).suffix.lower() in {".html", ".htm"}:
        text = read_page(text)
    if not text or text.isspace():
        return Fault(reason=EMPTY_TEXT, detail=path)
    return dict(zip(FILE_FIELDS, (path, PurePath(path).name, text), strict=True))


def read_page(page: str) -> str:
    """Return the text of an HTML page, one line for each block."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


class _Page(HTMLParser):
    """Gathers the text of a page, with a line break for every tag that is not inline."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        if tag not in _INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, None)

    def handle_data(self, data: str) -> None:
        if self.cdata_elem not in _HIDDEN:  # newer Pythons set it in a title too
            self.parts.append(re.sub(r"\s+", " ", data))

"""Make a retrieval set of long documents in BEIR's layout from the Debian Administrator's Handbook.

    scripts/quality long-set OUT [--cache DIR]

A document is a sequence of pages of the book, in one language, of at least 12 KiB of text: two to ten thousand tokens.
A query is a sentence from its second half, and is removed from the document: the passage around it is the answer.
English, Russian and Chinese, about 120 documents and three times as many queries::

    OUT/corpus.jsonl  queries.jsonl  qrels/test.tsv
    OUT/sources.json                                 package and version that it was made from

- Ids are `LANG:FIRST_PAGE` for documents (`ru:sect.virtualization`), the same with `?N` for queries.
- Paragraphs that are still in English are dropped from the translations.
- The package is fetched by `apt-get download` (nothing is installed) into --cache, once. The same version gives the
  same bytes.
- Progress and errors go to standard error; exit code 1 is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from evaluation.debian import (
    CACHE,
    SourceError,
    fetch_packages,
    read_members,
    read_version,
    write_judgements,
    write_rows,
)

PACKAGE = "debian-handbook"
LANGUAGES = {"en": "en-US", "ru": "ru-RU", "zh": "zh-CN"}  # language -> the package's folder
MIN_BYTES = 12 << 10  # of a document
QUERIES_PER_DOCUMENT = 3
DEEP = 0.5  # part of a document that is before any query's passage
MIN_SENTENCE, MAX_SENTENCE = 80, 320  # bytes of a query
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZА-ЯЁ«\"(])|(?<=[。！？])")  # noqa: RUF001  full stops of Chinese
MUTE = {"script", "style", "pre"}
MUTE_CLASSES = {"docnav", "url", "toc", "indexterm"}  # navigation, addresses, tables of contents
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page in one language."""

    paragraphs: tuple[str, ...]
    next_page: str | None
    "file name of the page that follows in the book"


def read_page(html: str) -> Page:
    """Return a page's paragraphs, without headings and listings."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return Page(paragraphs=tuple(reader.paragraphs), next_page=reader.next_page)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.next_page: str | None = None
        self._open: list[tuple[str, bool]] = [("", False)]  # tag, and whether its text is left out
        self._blocks: list[tuple[int, list[str]]] = []  # of open paragraphs: depth and text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        names = set((attributes.get("class") or "").split())
        if tag == "a" and attributes.get("accesskey") == "n":
            self.next_page = attributes.get("href")
        if tag in VOID:
            return
        self._open.append((tag, self._open[-1][1] or tag in MUTE or bool(names & MUTE_CLASSES)))
        if tag == "div" and "para" in names:
            self._blocks.append((len(self._open), []))

    def handle_data(self, data: str) -> None:
        if self._blocks and not self._open[-1][1]:
            self._blocks[-1][1].append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {open_tag for open_tag, _ in self._open}:
            return
        while self._open.pop()[0] != tag:
            pass
        if self._blocks and len(self._open) < self._blocks[-1][0]:
            text = " ".join("".join(self._blocks.pop()[1]).split())
            if text:
                self.paragraphs.append(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongDocument:
    """A sequence of pages, and the sentences that were removed from it."""

    name: str
    text: str
    queries: tuple[str, ...]


def read_book(package: Path, folder: str) -> dict[str, Page]:
    """Return a language's pages by file name."""
    inside = f"/html/{folder}/"
    return {
        path.rpartition("/")[2]: read_page(html)
        for path, html in read_members(package, suffix=".html")
        if inside in path
    }


def order_pages(pages: Mapping[str, Page]) -> list[str]:
    """Return page names in the book's order: each page names the next."""
    name: str | None = "index.html"
    ordered: list[str] = []
    while name is not None and name in pages and name not in ordered:
        ordered.append(name)
        name = pages[name].next_page
    return ordered


def join_pages(pages: Mapping[str, Page], english: Mapping[str, Page] | None) -> Iterator[tuple[str, list[str]]]:
    """Yield the first page's name and the paragraphs of each sequence of pages that is long enough."""
    first, paragraphs = "", list[str]()
    for name in order_pages(pages):
        known = set(english[name].paragraphs) if english is not None and name in english else set[str]()
        first = first or name.removesuffix(".html")
        paragraphs += [text for text in pages[name].paragraphs if text not in known]
        if sum(len(text.encode()) for text in paragraphs) >= MIN_BYTES:
            yield first, paragraphs
            first, paragraphs = "", []


def take_queries(name: str, paragraphs: Sequence[str]) -> LongDocument:
    """Remove sentences from the second half of a document, each from another paragraph."""
    total, before = sum(map(len, paragraphs)), 0
    deep: list[tuple[bytes, int, str]] = []
    for place, text in enumerate(paragraphs):
        if before >= DEEP * total:
            sentences = [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]
            good = [one for one in sentences[1:] if MIN_SENTENCE <= len(one.encode()) <= MAX_SENTENCE]
            if len(sentences) >= 3 and good:
                deep.append((hashlib.blake2b(text.encode(), digest_size=8).digest(), place, good[0]))
        before += len(text)
    chosen = {place: query for _, place, query in sorted(deep)[:QUERIES_PER_DOCUMENT]}
    left = [text.replace(chosen[place], "") if place in chosen else text for place, text in enumerate(paragraphs)]
    body = "\n\n".join(" ".join(text.split()) for text in left)
    return LongDocument(name=name, text=body, queries=tuple(q for _, q in sorted(chosen.items()) if q not in body))


def make_set(out: Path, *, cache: Path) -> dict[str, int]:
    """Write the set into `out`; return the number of documents of each language."""
    package = fetch_packages([PACKAGE], cache)[PACKAGE]
    books = {lang: read_book(package, folder) for lang, folder in LANGUAGES.items()}
    documents = {
        lang: [take_queries(f"{lang}:{name}", paragraphs) for name, paragraphs in join_pages(pages, english)]
        for lang, pages in books.items()
        for english in [None if lang == "en" else books["en"]]
    }
    together = [document for lang in LANGUAGES for document in documents[lang]]
    queries = [(f"{each.name}?{n}", text, each.name) for each in together for n, text in enumerate(each.queries)]
    write_judgements(out, ((query_id, name) for query_id, _, name in queries))
    write_rows(out / "corpus.jsonl", ({"_id": each.name, "title": "", "text": each.text} for each in together))
    write_rows(out / "queries.jsonl", ({"_id": query_id, "text": text} for query_id, text, _ in queries))
    (out / "sources.json").write_text(json.dumps({PACKAGE: read_version(package)}) + "\n", encoding="utf-8")
    return {lang: len(each) for lang, each in documents.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the set; the exit code is returned."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    try:
        counts = make_set(options.out, cache=options.cache)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    shown = ", ".join(f"{number} {lang}" for lang, number in counts.items())
    print(f"{options.out}: {shown} documents", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

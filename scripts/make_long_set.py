#!/usr/bin/env python3
"""Makes a retrieval set of long documents in BEIR's layout from the Debian Administrator's Handbook.

    scripts/make_long_set.py OUT [--cache DIR]

A document is a run of pages of the book, in one language, of 12 KiB of text at least: two to ten thousand tokens. A
query is a sentence from deep inside one, behind the first half, and is taken out of the document: what answers it is
the passage around it. English, Russian and Chinese, about 120 documents and three times as many queries::

    OUT/corpus.jsonl  queries.jsonl  qrels/test.tsv
    OUT/sources.json                                 package and version that it was made from

- Ids are `LANG:FIRST_PAGE` for documents (`ru:sect.virtualization`), the same with `?N` for queries.
- Paragraphs that are still in English are dropped from the translations.
- The package is fetched by `apt-get download` (nothing is installed) into --cache, and not again. The same version
  gives the same bytes.
- Progress and faults go to standard error; exit code 1 is a fault.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from long_set.handbook import Page, read_page
from retrieval_set.debian import SourceError, fetch_packages, read_members, read_version

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "packages"
PACKAGE = "debian-handbook"
LANGUAGES = {"en": "en-US", "ru": "ru-RU", "zh": "zh-CN"}  # our name of a language -> the folder's
MIN_BYTES = 12 << 10  # of a document
QUERIES_PER_DOCUMENT = 3
DEEP = 0.5  # part of a document that is before any query's passage
MIN_SENTENCE, MAX_SENTENCE = 80, 320  # bytes of a query
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZА-ЯЁ«\"(])|(?<=[。！？])")  # noqa: RUF001  full stops of Chinese


@dataclass(frozen=True, slots=True, kw_only=True)
class LongDocument:
    """A run of pages, and the sentences that were taken out of it."""

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
    """Return the names of pages as the book has them: each names the one that follows."""
    name: str | None = "index.html"
    ordered: list[str] = []
    while name is not None and name in pages and name not in ordered:
        ordered.append(name)
        name = pages[name].next_page
    return ordered


def join_pages(pages: Mapping[str, Page], english: Mapping[str, Page] | None) -> Iterator[tuple[str, list[str]]]:
    """Yield the first page's name and the paragraphs of each run of pages that is long enough."""
    first, paragraphs = "", list[str]()
    for name in order_pages(pages):
        known = set(english[name].paragraphs) if english is not None and name in english else set[str]()
        first = first or name.removesuffix(".html")
        paragraphs += [text for text in pages[name].paragraphs if text not in known]
        if sum(len(text.encode()) for text in paragraphs) >= MIN_BYTES:
            yield first, paragraphs
            first, paragraphs = "", []


def take_queries(name: str, paragraphs: Sequence[str]) -> LongDocument:
    """Take sentences from deep inside out of a document, each from another paragraph that goes on without it."""
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
    """Write the set into `out`; the number of documents of each language is returned."""
    package = fetch_packages([PACKAGE], cache)[PACKAGE]
    books = {lang: read_book(package, folder) for lang, folder in LANGUAGES.items()}
    documents = {
        lang: [take_queries(f"{lang}:{name}", paragraphs) for name, paragraphs in join_pages(pages, english)]
        for lang, pages in books.items()
        for english in [None if lang == "en" else books["en"]]
    }
    together = [document for lang in LANGUAGES for document in documents[lang]]
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    _write_rows(out / "corpus.jsonl", ({"_id": each.name, "title": "", "text": each.text} for each in together))
    queries = [(f"{each.name}?{n}", text, each.name) for each in together for n, text in enumerate(each.queries)]
    _write_rows(out / "queries.jsonl", ({"_id": query_id, "text": text} for query_id, text, _ in queries))
    judged = ["query-id\tcorpus-id\tscore", *(f"{query_id}\t{name}\t1" for query_id, _, name in queries)]
    (out / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", encoding="utf-8")
    (out / "sources.json").write_text(json.dumps({PACKAGE: read_version(package)}) + "\n", encoding="utf-8")
    return {lang: len(each) for lang, each in documents.items()}


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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

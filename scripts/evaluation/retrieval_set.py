"""Make a real multilingual retrieval set in BEIR's layout from LibreOffice's help, as Debian packages it.

    scripts/quality retrieval-set OUT [--documents-per-language N] [--cache DIR]

The how-to pages of the help ("Inserting and Editing Footnotes or Endnotes") exist in many languages, translated by
people. A document is the beginning of a page without its title, a query is the title; the relevant document is the
page of that title, in the query's language and in every other that has it. 12 languages in 6 scripts, about 2,800
documents and 2,600 queries::

    OUT/corpus.jsonl  queries.jsonl  qrels/test.tsv    all languages in one; a query's page is relevant in each of them
    OUT/LANG/...                                       one language: its queries, its documents
    OUT/cross/...                                      the queries of the other languages against the English documents
    OUT/sources.json                                   packages and versions that it was made from

- Ids are `LANG:MODULE/PAGE` for documents (`de:swriter/footnote_usage`), the same and `?` for queries: ids that differ
  in the language only are translations.
- Paragraphs that are still in English are dropped, and pages that mostly are. Documents have 300 to 1,500 bytes,
  complete paragraphs, no two the same. A title that two pages share, or that its own document repeats, is not a query.
- Packages are fetched by `apt-get download` (nothing is installed) into --cache, once. The same versions give the same
  bytes.
- Progress and errors go to standard error; exit code 1 is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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

MIN_BYTES, MAX_BYTES = 300, 1500  # of a document's text: in most languages 60 to 400 tokens
MIN_TRANSLATED = 0.7  # of a page's characters; the rest is still English and is dropped
PIVOT = "en"
# Tables, code, captions of icons and lists of links are left out.
PARAGRAPHS = {"", "paragraph", "listitem", "ol_item", "ul_item"}
MUTE_CLASSES = {"relatedtopics", "howtoget", "MAC"}  # the span after a Mac's key names the usual key
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
DEFAULT_DOCUMENTS = 240

# Language -> suffix of the package libreoffice-help-NAME.
LANGUAGES = {
    "de": "de",
    "el": "el",
    "en": "en-us",
    "es": "es",
    "fr": "fr",
    "it": "it",
    "ja": "ja",
    "ko": "ko",
    "pt": "pt-br",
    "ru": "ru",
    "tr": "tr",
    "zh": "zh-cn",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page in one language."""

    title: str
    paragraphs: tuple[str, ...]


def read_page(html: str) -> Page:
    """Return a page's title and text; a page without a heading has an empty title."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return Page(title=reader.title, paragraphs=tuple(reader.paragraphs))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.paragraphs: list[str] = []
        self._open: list[tuple[str, bool]] = [("", True)]  # tag, and whether its text is left out
        self._block: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            if tag == "br":
                self.handle_data(" ")  # or the words around it would be one
            return
        attributes = dict(attrs)
        name = attributes.get("class") or ""
        mute = (self._open[-1][1] and attributes.get("id") != "DisplayArea") or name in MUTE_CLASSES
        self._open.append((tag, mute))
        if tag == "h1" or (tag == "p" and name in PARAGRAPHS):
            self._block = []

    def handle_data(self, data: str) -> None:
        if self._block is not None and not self._open[-1][1]:
            self._block.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in {open_tag for open_tag, _ in self._open}:
            while self._open.pop()[0] != tag:
                pass
        if tag in {"h1", "p"} and self._block is not None:
            text = " ".join("".join(self._block).split())
            self._block = None
            if tag == "h1":
                self.title = self.title or text
            elif text:
                self.paragraphs.append(text)


Pages = Mapping[str, Mapping[str, Page]]  # language -> topic -> page


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One topic in one language: a document, and a query if its title is worth asking."""

    topic: str
    lang: str
    text: str
    query: str | None

    @property
    def document_id(self) -> str:
        """`de:swriter/footnote_usage`."""
        return f"{self.lang}:{self.topic}"

    @property
    def query_id(self) -> str:
        """Never a document's id: some evaluators drop a hit whose id is the query's."""
        return f"{self.lang}:{self.topic}?"


def choose_entries(pages: Pages, *, per_language: int) -> list[Entry]:
    """Return at most `per_language` topics of each language, those first that the most languages have."""
    entries = {lang: _entries(lang, topics, pages[PIVOT]) for lang, topics in sorted(pages.items())}
    num_languages = Counter(entry.topic for chosen in entries.values() for entry in chosen)

    def rank(entry: Entry) -> tuple[int, bytes]:
        return -num_languages[entry.topic], hashlib.blake2b(entry.topic.encode(), digest_size=8).digest()

    return [entry for chosen in entries.values() for entry in sorted(chosen, key=rank)[:per_language]]


def _entries(lang: str, topics: Mapping[str, Page], pivot: Mapping[str, Page]) -> list[Entry]:
    texts = {topic: _body(page, pivot.get(topic) if lang != PIVOT else None) for topic, page in sorted(topics.items())}
    copies = Counter(texts.values())
    titles = Counter(page.title.casefold() for page in topics.values())
    return [
        Entry(
            topic=topic,
            lang=lang,
            text=text,
            query=topics[topic].title if _is_worth_asking(topics[topic].title, text, titles) else None,
        )
        for topic, text in texts.items()
        if len(text.encode()) >= MIN_BYTES and copies[text] == 1
    ]


def _body(page: Page, english: Page | None) -> str:
    """Return the first paragraphs that fit, or nothing for a page that is not translated."""
    paragraphs = page.paragraphs
    if english is not None:
        paragraphs = tuple(text for text in page.paragraphs if text not in english.paragraphs)
        num_characters = sum(map(len, page.paragraphs))
        if page.title == english.title or sum(map(len, paragraphs)) < MIN_TRANSLATED * num_characters:
            return ""
    body = ""
    for paragraph in paragraphs:
        longer = f"{body} {paragraph}".lstrip()
        if len(longer.encode()) > MAX_BYTES:
            break
        body = longer
    return body


def _is_worth_asking(title: str, text: str, titles: Mapping[str, int]) -> bool:
    """Leave out a title that two pages have, and one that its own document repeats word by word."""
    return bool(title) and titles[title.casefold()] == 1 and title.casefold() not in text.casefold()


def exit_code_of(queries: Iterable[Entry], documents: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return query and document id of all pairs about the same topic, whatever their languages."""
    by_topic: dict[str, list[str]] = {}
    for entry in documents:
        by_topic.setdefault(entry.topic, []).append(entry.document_id)
    return [(query.query_id, found) for query in queries for found in by_topic.get(query.topic, ())]


def write_set(folder: Path, *, queries: Sequence[Entry], documents: Sequence[Entry]) -> None:
    """Write corpus.jsonl, queries.jsonl and qrels/test.tsv; a query that no document answers is left out."""
    judgements = exit_code_of((query for query in queries if query.query), documents)
    answered = {query_id for query_id, _ in judgements}
    write_judgements(folder, judgements)
    write_rows(
        folder / "corpus.jsonl",
        ({"_id": entry.document_id, "title": "", "text": entry.text, "lang": entry.lang} for entry in documents),
    )
    write_rows(
        folder / "queries.jsonl",
        (
            {"_id": entry.query_id, "text": entry.query, "lang": entry.lang}
            for entry in queries
            if entry.query and entry.query_id in answered
        ),
    )


def read_pages(package: Path) -> dict[str, Page]:
    """Return the how-to pages of one language's package by topic: `swriter/footnote_usage`."""
    pages: dict[str, Page] = {}
    for path, html in read_members(package, suffix=".html"):
        *_, module, kind, name = path.split("/")
        if kind == "guide":
            pages[f"{module}/{name.removesuffix('.html')}"] = read_page(html)
    return pages


def make_set(out: Path, *, documents_per_language: int, cache: Path) -> dict[str, int]:
    """Write the set into `out`; the number of documents of each language is returned."""
    names = {lang: f"libreoffice-help-{name}" for lang, name in LANGUAGES.items()}
    packages = fetch_packages(list(names.values()), cache)
    pages = {lang: read_pages(packages[name]) for lang, name in names.items()}
    entries = choose_entries(pages, per_language=documents_per_language)
    by_lang = {lang: [entry for entry in entries if entry.lang == lang] for lang in names}
    write_set(out, queries=entries, documents=entries)
    for lang, own in by_lang.items():
        write_set(out / lang, queries=own, documents=own)
    foreign = [entry for entry in entries if entry.lang != PIVOT]
    write_set(out / "cross", queries=foreign, documents=by_lang[PIVOT])
    sources = {package: read_version(path) for package, path in packages.items()}
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    return {lang: len(own) for lang, own in by_lang.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the set that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a multilingual retrieval set from LibreOffice's help.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--documents-per-language", type=int, default=DEFAULT_DOCUMENTS, metavar="N")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where packages are kept")
    options = parser.parse_args(argv)
    if options.documents_per_language < 1:
        parser.error(f"--documents-per-language {options.documents_per_language}: expected 1 or more")
    try:
        made = make_set(options.out, documents_per_language=options.documents_per_language, cache=options.cache)
    except (SourceError, OSError) as error:
        print(f"retrieval-set: error: {error}", file=sys.stderr)
        return 1
    languages = ", ".join(f"{lang} {number}" for lang, number in made.items())
    print(f"retrieval-set: {options.out}: {sum(made.values())} documents ({languages})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Makes a real multilingual retrieval set in BEIR's layout from LibreOffice's help, as Debian packages it.

    scripts/make_retrieval_set.py OUT [--documents-per-language N] [--cache DIR]

The how-to pages of the help ("Inserting and Editing Footnotes or Endnotes") exist in many languages, translated by
people. A document is the beginning of a page without its title, a query is the title; the relevant document is the
page that the title is from. 12 languages in 6 scripts, about 2,700 documents and 2,500 queries::

    OUT/corpus.jsonl  queries.jsonl  qrels/test.tsv    all languages in one; a query's page is relevant in each of them
    OUT/LANG/...                                       one language: its queries, its documents
    OUT/cross/...                                      the queries of the other languages against the English documents
    OUT/sources.json                                   packages and versions that it was made from

- Ids are `LANG:MODULE/PAGE` for documents (`de:swriter/footnote_usage`), the same and `?` for queries: what differs in
  the language only is a translation.
- Paragraphs that are still in English are dropped, and pages that mostly are; documents have 300 to 1,500 bytes, whole
  paragraphs, no two the same. A title that two pages share, or that its own document repeats, is no query.
- Packages are fetched by `apt-get download` (nothing is installed) into --cache, and not again. The same versions give
  the same bytes.
- Progress and faults go to standard error; exit code 1 is a fault.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from retrieval_set.beir import PIVOT, choose_entries, write_set
from retrieval_set.debian import SourceError, fetch_packages, read_members, read_version
from retrieval_set.help_page import Page, read_page

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "packages"
DEFAULT_DOCUMENTS = 240

# Our name of a language -> the package's, which is libreoffice-help-NAME.
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
        parser.error(f"--documents-per-language {options.documents_per_language}: 1 or more")
    try:
        made = make_set(options.out, documents_per_language=options.documents_per_language, cache=options.cache)
    except (SourceError, OSError) as error:
        print(f"make_retrieval_set: error: {error}", file=sys.stderr)
        return 1
    languages = ", ".join(f"{lang} {number}" for lang, number in made.items())
    print(f"make_retrieval_set: {options.out}: {sum(made.values())} documents ({languages})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

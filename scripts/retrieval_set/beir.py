"""Makes documents, queries and judgements of pages in several languages, and writes them as BEIR has them.

A document is the beginning of a page without its title; a query is the title. What answers a query is, by construction,
the same page: in the query's own language, and in every other that has it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrieval_set.help_page import Page

MIN_BYTES, MAX_BYTES = 300, 1500  # of a document's text: in most languages 60 to 400 tokens
MIN_TRANSLATED = 0.7  # of a page's characters; the rest stands there in English and is dropped
PIVOT = "en"

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
    """Return the whole paragraphs that fit, or nothing for a page that is not translated."""
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


def judge(queries: Iterable[Entry], documents: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return query and document id of all pairs about the same topic, whatever their languages."""
    by_topic: dict[str, list[str]] = {}
    for entry in documents:
        by_topic.setdefault(entry.topic, []).append(entry.document_id)
    return [(query.query_id, found) for query in queries for found in by_topic.get(query.topic, ())]


def write_set(folder: Path, *, queries: Sequence[Entry], documents: Sequence[Entry]) -> None:
    """Write corpus.jsonl, queries.jsonl and qrels/test.tsv; a query that no document answers is left out."""
    judgements = judge((query for query in queries if query.query), documents)
    answered = {query_id for query_id, _ in judgements}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write_rows(
        folder / "corpus.jsonl",
        ({"_id": entry.document_id, "title": "", "text": entry.text, "lang": entry.lang} for entry in documents),
    )
    _write_rows(
        folder / "queries.jsonl",
        (
            {"_id": entry.query_id, "text": entry.query, "lang": entry.lang}
            for entry in queries
            if entry.query and entry.query_id in answered
        ),
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"{query_id}\t{found}\t1" for query_id, found in judgements)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Mapping[str, str | None]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

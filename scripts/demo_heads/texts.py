"""Questions and answers in many languages to train on: titles and bodies of GNOME's help and Debian's install guide.

Neither package has text of the retrieval set, which is LibreOffice's help.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

from retrieval_set.debian import read_members

HELP, GUIDE = PACKAGES = ("gnome-user-docs", "installation-guide-amd64")
ENGLISH = "en"
MIN_BYTES, MAX_BYTES = 200, 700  # of a body
MALLARD = "{http://projectmallard.org/1.0/}"
NUMBER = re.compile(r"^[A-Z0-9]+(\.\d+)*\.\s+")  # of a section: "2.1.3. "


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A title and the beginning of the text below it."""

    lang: str
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section as its package has it, whole, in whatever language it is."""

    lang: str
    title: str
    paragraphs: tuple[str, ...]


def choose_pairs(sections: Iterable[Section], *, per_language: int) -> list[Pair]:
    """Return up to `per_language` pairs of each language that has as many as half of that, in a mixed, fixed order."""
    found = list(sections)
    english = {text for section in found if section.lang == ENGLISH for text in (section.title, *section.paragraphs)}
    by_lang: dict[str, dict[str, Pair]] = {}
    for section in found:
        pair = _to_pair(section, frozenset() if section.lang == ENGLISH else english)
        if pair is not None:
            by_lang.setdefault(pair.lang, {}).setdefault(pair.title, pair)
    chosen: list[Pair] = []
    for _, pairs in sorted(by_lang.items()):
        if len(pairs) >= per_language / 2:
            chosen += sorted(pairs.values(), key=_mixing_key)[:per_language]
    return chosen


def read_sections(packages: dict[str, Path]) -> Iterator[Section]:
    """Yield the sections of both packages."""
    for path, xml in read_members(packages[HELP], suffix=".page"):
        lang = path.split("/help/")[1].split("/")[0]
        section = read_help_page("en" if lang == "C" else _plain(lang), xml)
        if section is not None:
            yield section
    for path, html in read_members(packages[GUIDE], suffix=".html"):
        yield from read_guide_page(_plain(path.split("/")[-2]), html)


def read_help_page(lang: str, xml: str) -> Section | None:
    """Read one page of GNOME's help; None for one that stands in for another or cannot be read by itself."""
    try:
        page = ET.fromstring(xml)
    except ET.ParseError:  # an entity that another file declares
        return None
    for parent in list(page.iter()):
        for child in list(parent):
            if child.tag in {f"{MALLARD}comment", f"{MALLARD}info"}:
                parent.remove(child)
    title = page.find(f"{MALLARD}title")
    if title is None:
        return None
    paragraphs = [_join(paragraph.itertext()) for paragraph in page.iter(f"{MALLARD}p")]
    return Section(lang=lang, title=_join(title.itertext()), paragraphs=tuple(text for text in paragraphs if text))


def read_guide_page(lang: str, html: str) -> list[Section]:
    """Read one page of the install guide, several sections."""
    reader = _GuideReader()
    reader.feed(html)
    reader.close()
    return [
        Section(lang=lang, title=NUMBER.sub("", title), paragraphs=tuple(paragraphs))
        for title, paragraphs in reader.sections
    ]


class _GuideReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = []
        self._block: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p" or (tag in {"h2", "h3", "h4"} and ("class", "title") in attrs):
            self._block = []

    def handle_data(self, data: str) -> None:
        if self._block is not None:
            self._block.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._block is None or tag not in {"p", "h2", "h3", "h4"}:
            return
        text, self._block = _join(self._block), None
        if tag != "p":
            self.sections.append((text, []))
        elif text and self.sections:
            self.sections[-1][1].append(text)


def _to_pair(section: Section, english: frozenset[str] | set[str]) -> Pair | None:
    """Return the pair of a section, or None where there is too little text or it is not translated."""
    if not section.title or section.title in english:
        return None
    text = ""
    for paragraph in section.paragraphs:
        longer = f"{text} {paragraph}".lstrip()
        if paragraph in english or len(longer.encode()) > MAX_BYTES:
            break
        text = longer
    if len(text.encode()) < MIN_BYTES:
        return None
    return Pair(lang=section.lang, title=section.title, text=text)


def _join(pieces: Iterable[str]) -> str:
    return " ".join("".join(pieces).split())


def _plain(lang: str) -> str:
    """Return `pt` for `pt_BR`: the variants of a language are the same to a token."""
    return lang.split("_", maxsplit=1)[0]


def _mixing_key(pair: Pair) -> bytes:
    return hashlib.blake2b(f"{pair.lang} {pair.title}".encode(), digest_size=8).digest()

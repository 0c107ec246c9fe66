"""Reads a page of the Debian Administrator's Handbook: its paragraphs, and the page that follows."""

from dataclasses import dataclass
from html.parser import HTMLParser

MUTE = {"script", "style", "pre"}
MUTE_CLASSES = {"docnav", "url", "toc", "indexterm"}  # links to and fro, addresses, tables of contents
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page in one language."""

    paragraphs: tuple[str, ...]
    next_page: str | None
    "file name of the page that follows in the book"


def read_page(html: str) -> Page:
    """Return what a page says in paragraphs, headings and listings left out."""
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
        self._blocks: list[tuple[int, list[str]]] = []  # of open paragraphs: how deep, and what they say

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

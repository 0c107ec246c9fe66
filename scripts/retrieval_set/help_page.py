"""Reads one page of LibreOffice's help: its title, and the paragraphs that say something in sentences."""

from dataclasses import dataclass
from html.parser import HTMLParser

# Tables, code, captions of icons and lists of links are left out.
PARAGRAPHS = {"", "paragraph", "listitem", "ol_item", "ul_item"}
MUTE_CLASSES = {"relatedtopics", "howtoget", "MAC"}  # where a key is named for a Mac, the next span names the usual one
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page in one language."""

    title: str
    paragraphs: tuple[str, ...]


def read_page(html: str) -> Page:
    """Return what a page says; a page without a heading has an empty title."""
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

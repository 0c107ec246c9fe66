#!/usr/bin/env python3
"""Make a real multilingual corpus, as JSON lines, from the message catalogues inside the wheels of Django and Sphinx.

    scripts/make_sample_corpus.py OUT.jsonl [--documents N]

Nothing is fetched: the text is that of the installed packages Django and Sphinx (both BSD licensed). One line each::

    {"id": "django/admin/fr/0012", "title": "", "text": "...", "lang": "fr", "source": "django/admin"}

- 21 languages in 12 scripts. English is the catalogue's own msgid, the others are its translations; fuzzy ones are
  left out.
- A *sentence* is one message. Its number is the message's place in the catalogue's template, so rows whose ids differ
  only in the language are translations of each other, whatever --documents is (the template changes only with the
  package's version).
- A *page* joins, up to 120, the sentences of one source file (`django/core/fr/db-models-fields`) or of a whole
  catalogue (`django/core/fr/all`). It has a title and is long: many pages are beyond 512 tokens. Pages of the same
  thing in several languages have the same suffix.
- Placeholders for numbers become numbers (10, 20, ...); a message with other placeholders is left out. Formatting
  tags, HTML entities and reST's double backquotes are removed; line breaks become spaces.
- --documents N takes whole messages with all their translations, in an order that is fixed but mixed, until N rows
  are reached. The rows are mixed too: every part of the file has short and long rows of all languages.

The same packages and the same N give the same bytes. Progress and errors go to standard error; exit code 1 is
an error.
"""

# ruff: noqa: RUF001  - punctuation of other scripts is meant

import argparse
import hashlib
import html
import importlib.util
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_DOCUMENTS = 2400
MIN_ENGLISH_CHARS = 25  # shorter messages are labels, not sentences
MIN_UNENDED_CHARS = 40  # so are those up to this length without a full stop
MIN_LANGUAGES = 6
MIN_PAGE_SENTENCES, MAX_PAGE_SENTENCES = 8, 120
PAGE_SHARE = 0.08  # of all rows

# Language -> the folder's name in Django, and in Sphinx.
LANGUAGES = {
    "ar": ("ar", "ar"),
    "bn": ("bn", "bn"),
    "de": ("de", "de"),
    "el": ("el", "el"),
    "en": ("en", "en"),
    "es": ("es", "es"),
    "fa": ("fa", "fa"),
    "fr": ("fr", "fr"),
    "he": ("he", "he"),
    "hi": ("hi", "hi"),
    "it": ("it", "it"),
    "ja": ("ja", "ja"),
    "ka": ("ka", "ka"),
    "ko": ("ko", "ko"),
    "pt": ("pt_BR", "pt_BR"),
    "ru": ("ru", "ru"),
    "th": ("th", "th"),
    "tr": ("tr", "tr"),
    "uk": ("uk", "uk_UA"),
    "vi": ("vi", "vi"),
    "zh": ("zh_Hans", "zh_CN"),
}

PLACEHOLDER = re.compile(
    r"%(?:\((?P<named>\w+)\))?[-+#0]*[\d.*]*(?P<kind>[diouxXeEfFgGcrsa])(?(named)|(?![a-z]))"
    r"|\$?\{(?P<braced>[\w.!:]+)\}|\{\}"
)
NUMBER_NAME = re.compile(r"limit|value|max|min|count|num|length|size|digits|total|expected", re.IGNORECASE)
INLINE_TAG = re.compile(r"</?(?:a|b|i|em|code|span|strong)\b[^<>]*>", re.IGNORECASE)
BLOCK_TAG = re.compile(r"</?(?:p|br|li|ul|ol|h\d)\b[^<>]*>", re.IGNORECASE)


class SampleCorpusError(Exception):
    """An error that the user can fix; its text is the one line that is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """One template of messages and the folders of its translations."""

    source: str  # "django/admin"
    template: Path
    translations: dict[str, Path]  # lang -> compiled catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a template in every language that has it."""

    source: str
    number: int
    origin: str  # the source file of the message, without its suffix: "forms-fields"
    texts: dict[str, str]


def find_catalogues() -> list[Catalogue]:
    """Return the catalogues of the installed Django and Sphinx, in a fixed order."""
    django, sphinx = _package_folder("django"), _package_folder("sphinx")
    folders = {"django/core": django / "conf" / "locale"}
    folders |= {f"django/{folder.parent.name}": folder for folder in sorted(django.glob("contrib/*/locale"))}
    catalogues = [
        Catalogue(
            source=source,
            template=folder / "en" / "LC_MESSAGES" / "django.po",
            translations={lang: folder / name / "LC_MESSAGES" / "django.mo" for lang, (name, _) in LANGUAGES.items()},
        )
        for source, folder in folders.items()
    ]
    locale = sphinx / "locale"
    translations = {lang: locale / name / "LC_MESSAGES" / "sphinx.mo" for lang, (_, name) in LANGUAGES.items()}
    return [*catalogues, Catalogue(source="sphinx", template=locale / "sphinx.pot", translations=translations)]


def read_messages(catalogue: Catalogue) -> Iterator[Message]:
    """Yield the sentences of a catalogue, in template order, each in every language that has it."""
    from babel.messages.pofile import read_po  # noqa: PLC0415  - babel comes with Sphinx, whose absence is one line

    with catalogue.template.open("rb") as file:
        template = read_po(file)
    translated = {lang: _read_translations(path) for lang, path in catalogue.translations.items() if path.exists()}
    for number, message in enumerate(entry for entry in template if entry.id):
        english = clean(_last_form(message.id))
        if english is None or not _is_sentence(english):
            continue
        key = (message.context, message.id if isinstance(message.id, str) else message.id[0])
        texts = {"en": english}
        for lang, strings in translated.items():
            text = clean(strings[key]) if key in strings else None
            if text and text != english:
                texts[lang] = text
        origin = Path(message.locations[0][0]) if message.locations else Path("other")
        yield Message(source=catalogue.source, number=number, origin=_slug(catalogue, origin), texts=texts)


def clean(text: str) -> str | None:
    """Return the text as a person would read it, or None if a placeholder needs words."""
    text = html.unescape(BLOCK_TAG.sub(" ", INLINE_TAG.sub("", text))).replace("``", "")
    numbers = itertools.count(10, 10)
    torn = False

    def fill(match: re.Match[str]) -> str:
        nonlocal torn
        numeric = match["kind"] in {"d", "i"} or NUMBER_NAME.search(match["named"] or match["braced"] or "")
        torn = torn or not numeric
        return str(next(numbers))

    text = PLACEHOLDER.sub(fill, text).replace("%%", "%")
    text = " ".join(text.split()).strip(" :：=")
    return text if text and not torn else None


def sample_documents(num_documents: int) -> list[dict[str, str]]:
    """Return the corpus: pages first chosen, then whole messages until the number is reached, mixed."""
    messages = [message for catalogue in find_catalogues() for message in read_messages(catalogue)]
    documents = _mixed(_pages(messages))[: int(num_documents * PAGE_SHARE)]
    groups = [list(_sentences(message)) for message in messages if len(message.texts) >= MIN_LANGUAGES]
    for group in sorted(groups, key=lambda group: _mixing_key(group[0]["id"])):
        documents += group[: num_documents - len(documents)]
    return _mixed(documents)


def _is_sentence(english: str) -> bool:
    return len(english) >= (MIN_ENGLISH_CHARS if english[-1] in ".!?" else MIN_UNENDED_CHARS)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SampleCorpusError(f"{name} is not installed: the corpus comes from it; pip install django sphinx")
    return Path(spec.origin).parent


def _read_translations(path: Path) -> dict[tuple[str | None, str], str]:
    from babel.messages.mofile import read_mo  # noqa: PLC0415  - as above

    with path.open("rb") as file:
        catalog = read_mo(file)
    return {
        (message.context, message.id if isinstance(message.id, str) else message.id[0]): _last_form(message.string)
        for message in catalog
        if message.id
    }


def _last_form(forms: Any) -> str:
    return forms if isinstance(forms, str) else forms[-1]


def _slug(catalogue: Catalogue, origin: Path) -> str:
    empty = {"contrib", catalogue.source.split("/")[-1], "templates", "__init__", "sphinx"}
    return "-".join(part for part in origin.with_suffix("").parts if part not in empty) or "package"


def _sentences(message: Message) -> Iterator[dict[str, str]]:
    for lang, text in sorted(message.texts.items()):
        yield _document(message.source, lang, f"{message.number:04}", "", text)


def _pages(messages: Sequence[Message]) -> list[dict[str, str]]:
    said: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for message in messages:
        for lang, text in message.texts.items():
            for suffix in (message.origin, "all"):
                said[message.source, lang, suffix].append(text)
    return [
        _document(source, lang, suffix, f"{source}: {suffix.replace('-', ' ')}", _join(sentences[:MAX_PAGE_SENTENCES]))
        for (source, lang, suffix), sentences in sorted(said.items())
        if len(sentences) >= MIN_PAGE_SENTENCES
    ]


def _join(sentences: Sequence[str]) -> str:
    ended = (text if text[-1] in ".!?。！？؟।" else f"{text}." for text in sentences)
    return " ".join(dict.fromkeys(ended))


def _document(source: str, lang: str, suffix: str, title: str, text: str) -> dict[str, str]:
    return {"id": f"{source}/{lang}/{suffix}", "title": title, "text": text, "lang": lang, "source": source}


def _mixing_key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _mixed(documents: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(documents, key=lambda document: _mixing_key(document["id"]))


def write_corpus(path: Path, documents: Sequence[dict[str, str]]) -> None:
    """Write the rows as JSON lines; ``path`` appears when all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.building")
    with building.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    building.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the corpus that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make a multilingual corpus from Django's and Sphinx's messages.")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--documents", type=int, default=DEFAULT_DOCUMENTS, metavar="N", help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.documents < 1:
        parser.error(f"--documents {options.documents}: 1 or more")
    try:
        documents = sample_documents(options.documents)
        write_corpus(options.out, documents)
    except (SampleCorpusError, OSError) as error:
        print(f"make_sample_corpus: error: {error}", file=sys.stderr)
        return 1
    languages = sorted({document["lang"] for document in documents})
    print(f"make_sample_corpus: {options.out}: {len(documents)} documents in {' '.join(languages)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

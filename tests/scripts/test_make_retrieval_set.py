"""`scripts/make_retrieval_set.py`: pages read from HTML, and documents, queries and judgements made of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_retrieval_set import main
from retrieval_set.beir import MAX_BYTES, MIN_BYTES, Entry, choose_entries, judge, write_set
from retrieval_set.help_page import Page, read_page

HTML = """<html><body><header><p>LibreOffice Help</p></header>
<div id="DisplayArea"><a name="x"></a><h1 id="a"><a name="b"></a>Saving
 Documents</h1>
<p class="paragraph">Press <span class="switchinline"><span hidden="true" class="MAC">Command</span><span hidden="true"
>Ctrl</span></span>+S.<br>Done.</p>
<table><tr><td><p class="tablecontentintable">my file</p></td></tr></table>
<ul><li><p class="listitem">A step with an <img src="x.png" alt=""> icon.</p></li></ul>
<div class="relatedtopics"><p class="paragraph">See also</p><div><p class="embedded">Opening</p></div></div>
<p class="">A note &amp; more.</p></div>
<footer><p>DEBUG</p></footer></body></html>"""


def page(title: str, *paragraphs: str) -> Page:
    return Page(title=title, paragraphs=paragraphs)


def filled(word: str, number: int) -> str:
    """A paragraph that is long enough for a document and like no other."""
    return f"{number} " + f"{word} " * (MIN_BYTES // len(word))


def test_a_page_is_its_heading_and_its_sentences() -> None:
    assert read_page(HTML) == page("Saving Documents", "Press Ctrl+S. Done.", "A step with an icon.", "A note & more.")


def test_a_page_without_a_heading_has_no_title() -> None:
    assert read_page("<p>Text</p>") == page("")


def test_documents_are_the_translated_beginning_and_queries_the_titles() -> None:
    english = page("Saving Documents", filled("save", 1), "Not translated.")
    german = page("Dokumente speichern", "Not translated.", filled("speichern", 1))
    entries = choose_entries({"en": {"doc": english}, "de": {"doc": german}}, per_language=9)
    assert [(entry.document_id, entry.query_id, entry.query) for entry in entries] == [
        ("de:doc", "de:doc?", "Dokumente speichern"),
        ("en:doc", "en:doc?", "Saving Documents"),
    ]
    assert [entry.text.endswith("Not translated.") for entry in entries] == [False, True]


@pytest.mark.parametrize(
    "left_out",
    [
        page("Saving Documents", filled("speichern", 1)),  # the title is not translated
        page("Dokumente speichern", filled("save", 1), "Kurz."),  # the text is not
        page("Dokumente speichern", "Kurz."),  # too short
        page("Dokumente speichern", filled("lang", 1) + "x" * MAX_BYTES),  # no whole paragraph fits
    ],
)
def test_pages_that_are_no_documents(left_out: Page) -> None:
    english = page("Saving Documents", filled("save", 1))
    entries = choose_entries({"en": {"doc": english}, "de": {"doc": left_out}}, per_language=9)
    assert [entry.lang for entry in entries] == ["en"]


def test_two_pages_of_one_text_are_none_and_two_of_one_title_are_no_queries() -> None:
    english = {
        "a": page("Same", filled("one", 1)),
        "b": page("same", filled("two", 2)),
        "c": page("Third", filled("copy", 3)),
        "d": page("Fourth", filled("copy", 3)),
        "e": page("Told twice", "Of things told twice. " + filled("e", 4)),
    }
    entries = choose_entries({"en": english}, per_language=9)
    assert {entry.topic: entry.query for entry in entries} == {"a": None, "b": None, "e": None}


def test_topics_of_many_languages_come_first() -> None:
    english = {f"t{number}": page(f"Title {number}", filled("english", number)) for number in range(9)}
    german = {f"t{number}": page(f"Titel {number}", filled("deutsch", number)) for number in (3, 7)}
    entries = choose_entries({"en": english, "de": german}, per_language=2)
    assert {entry.topic for entry in entries if entry.lang == "en"} == {"t3", "t7"}


@st.composite
def pages(draw: st.DrawFn) -> dict[str, dict[str, Page]]:
    words = st.sampled_from(["cell", "row", "table", "save", "表", "ряд"])
    made: dict[str, dict[str, Page]] = {}
    for lang in ("en", "de", "ja"):
        topics = draw(st.sets(st.integers(0, 5)))
        made[lang] = {
            f"m/{topic}": page(
                " ".join(draw(st.lists(words, max_size=3))),
                *(filled(f"{lang}{draw(words)}", topic) for _ in range(draw(st.integers(0, 3)))),
            )
            for topic in topics
        }
    return made


@given(pages(), st.integers(1, 4))
def test_what_holds_of_every_set(made: dict[str, dict[str, Page]], per_language: int) -> None:
    entries = choose_entries(made, per_language=per_language)
    ids = [entry.document_id for entry in entries]
    assert len(ids) == len(set(ids))
    assert len({(entry.lang, entry.text) for entry in entries}) == len(entries)
    for entry in entries:
        assert MIN_BYTES <= len(entry.text.encode()) <= MAX_BYTES
        assert entry.query is None or entry.query.casefold() not in entry.text.casefold()
    queries = [entry for entry in entries if entry.query]
    judgements = judge(queries, entries)
    assert {query_id for query_id, _ in judgements} == {entry.query_id for entry in queries}
    assert {found for _, found in judgements} <= set(ids)
    assert all(query_id[:-1].split(":")[1] == found.split(":")[1] for query_id, found in judgements)


def test_the_files_are_beirs_and_unanswered_queries_are_left_out(tmp_path: Path) -> None:
    text = filled("text", 1)
    documents = [Entry(topic="m/a", lang="en", text=text, query="A")]
    queries = [Entry(topic=topic, lang="de", text=text, query=topic) for topic in ("m/a", "m/b")]
    write_set(tmp_path, queries=queries, documents=documents)
    assert json.loads((tmp_path / "corpus.jsonl").read_text()) == {
        "_id": "en:m/a",
        "title": "",
        "text": text,
        "lang": "en",
    }
    assert json.loads((tmp_path / "queries.jsonl").read_text()) == {"_id": "de:m/a?", "text": "m/a", "lang": "de"}
    assert (tmp_path / "qrels" / "test.tsv").read_text() == "query-id\tcorpus-id\tscore\nde:m/a?\ten:m/a\t1\n"


def test_without_apt_the_fault_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tmp_path / "set"), "--cache", str(tmp_path / "cache")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "apt-get is not there" in said
    assert not (tmp_path / "set").exists()

"""`scripts/quality`: the retrieval set, its table and the training of the demo model's heads, on small inputs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import long_set
from evaluation.retrieval_set import MAX_BYTES, MIN_BYTES, Entry, Page, choose_entries, main, read_page, write_set
from evaluation.retrieval_table import OVERLAP, measure_all
from evaluation.train_heads import (
    Section,
    SparseHead,
    TextStates,
    choose_pairs,
    fit_direction,
    fit_scale,
    make_group,
    measure_gains,
    measure_mean,
    read_guide_page,
    read_help_page,
    score_sparse,
    sum_scores,
)

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

WIDTH, NUM_TOPICS = 8, 12
COMMON = [4, 5, 6, 7]  # tokens that stand in most texts; the others are a topic's own

HELP = """<page xmlns="http://projectmallard.org/1.0/"><info><desc><p>Not this.</p></desc></info>
<title>Change your
 password</title><comment><p>Nor this.</p></comment><steps><item><p>Open <gui>Users</gui>.</p></item></steps></page>"""
GUIDE = """<h2 class="title"><a></a>2.1. Supported Hardware</h2><p>Debian runs  on much.</p><h3 class="other">No</h3>
<h3 class="title">2.1.1. Laptops</h3><p>These too.</p><p> </p>"""

TOPICS = {
    "bike": (
        "How to repair a flat bicycle tyre",
        "Take the wheel off the bike, pull the tube out, find the hole and glue a patch on it.",
    ),
    "bread": (
        "Baking bread at home",
        "Mix flour, water, salt and yeast, let the dough rise for two hours, and put it into a hot oven.",
    ),
    "cat": ("Feeding a young cat", "A kitten eats small meals four times a day; never give it cow's milk."),
    "train": ("Train tickets to the capital", "A return ticket costs less when it is bought a week before the trip."),
}


def page(title: str, *paragraphs: str) -> Page:
    return Page(title=title, paragraphs=paragraphs)


def filled(word: str, number: int) -> str:
    """A paragraph that is long enough for a document and like no other."""
    return f"{number} " + f"{word} " * (MIN_BYTES // len(word))


def test_a_page_is_its_heading_and_its_sentences() -> None:
    assert read_page(HTML) == page("Saving Documents", "Press Ctrl+S. Done.", "A step with an icon.", "A note & more.")


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


def test_without_apt_the_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tmp_path / "set"), "--cache", str(tmp_path / "cache")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "apt-get is missing" in said
    assert not (tmp_path / "set").exists()


def test_queries_of_long_documents_are_removed_from_them() -> None:
    words = "something " * 6
    sentences = [f"Sentence {number} of this long paragraph says {words}about topic {number}." for number in range(24)]
    paragraphs = [" ".join(sentences[start : start + 4]) for start in range(0, 24, 4)]
    made = long_set.take_queries("en:page", paragraphs)
    assert made.queries
    assert all(80 <= len(query) <= 320 and query not in made.text for query in made.queries)


@pytest.mark.slow
def test_the_demo_model_answers_a_small_set(demo_m3: Path, tmp_path: Path) -> None:
    entries = [Entry(topic=topic, lang="en", text=text, query=query) for topic, (query, text) in TOPICS.items()]
    for name in ("en", "cross"):
        write_set(tmp_path / "set" / name, queries=entries, documents=entries)
    table = measure_all(tmp_path / "set", model=demo_m3, out=tmp_path)
    assert list(table) == ["en", "mean", "cross (en)"]
    assert all(np.isclose(table["en"][mode]["nDCG@10"], 1) for mode in ("dense", "ColBERT", "all"))
    assert table["en"]["sparse"]["nDCG@10"] >= table["en"][OVERLAP]["nDCG@10"]


def test_a_page_of_the_help_is_read_without_its_notes() -> None:
    assert read_help_page("en", HELP) == Section(lang="en", title="Change your password", paragraphs=("Open Users.",))
    assert read_help_page("en", "<page>&undefined;</page>") is None


def test_a_page_of_the_guide_is_several_sections_without_numbers() -> None:
    assert read_guide_page("en", GUIDE) == [
        Section(lang="en", title="Supported Hardware", paragraphs=("Debian runs on much.",)),
        Section(lang="en", title="Laptops", paragraphs=("These too.",)),
    ]


def test_pairs_are_translated_and_of_languages_with_enough() -> None:
    def section(lang: str, title: str, text: str) -> Section:
        return Section(lang=lang, title=title, paragraphs=(text * 30,))

    found = [
        *(section("en", f"Title {number}", f"english {number} ") for number in range(4)),
        *(section("de", f"Titel {number}", f"deutsch {number} ") for number in range(3)),
        section("de", "Title 1", "deutsch "),  # its title is English
        section("de", "Titel", "english 1 "),  # its text is
        section("fr", "Titre", "texte français "),  # the only one of its language
    ]
    pairs = choose_pairs(found, per_language=4)
    assert sorted((pair.lang, pair.title) for pair in pairs) == [
        *(("de", f"Titel {number}") for number in range(3)),
        *(("en", f"Title {number}") for number in range(4)),
    ]


def make_texts(draw: torch.Generator, *, num_common: Sequence[int]) -> list[TextStates]:
    """Texts of a world in which a state's first number says whether the token is common, and the rest says nothing."""
    made = []
    for topic in range(NUM_TOPICS):
        number = num_common[topic % len(num_common)]
        common = [COMMON[place] for place in torch.randperm(len(COMMON), generator=draw)[:number].tolist()]
        token_ids = [0, *common, 8 + topic, 2]
        states = 0.1 * torch.randn(len(token_ids), WIDTH, generator=draw)
        states[1 : 1 + number, 0] += 1
        made.append(TextStates(token_ids=token_ids, states=states, is_word=[True] * len(token_ids)))
    return made


@pytest.fixture
def world() -> tuple[list[TextStates], list[TextStates]]:
    draw = torch.Generator().manual_seed(5)
    # Some texts have no common token: plain overlap ranks others before them.
    return make_texts(draw, num_common=[4]), make_texts(draw, num_common=[0, 2, 4])


def test_training_finds_which_tokens_tell_texts_apart(world: tuple[list[TextStates], list[TextStates]]) -> None:
    titles, texts = world
    group = make_group(titles, texts, mean=measure_mean(texts))
    head = fit_direction([group])
    alike = SparseHead(weight=torch.zeros(WIDTH), bias=torch.ones(1))
    assert measure_gains(score_sparse(group, head)[0]).mean() > 0.99
    assert (
        measure_gains(score_sparse(group, head)[0]).mean() > measure_gains(score_sparse(group, alike)[0]).mean() + 0.05
    )
    common, own = torch.eye(WIDTH)[0], torch.zeros(WIDTH)
    assert torch.relu(common @ head.weight + head.bias) < 0.3 * torch.relu(own @ head.weight + head.bias)


def test_the_scale_makes_sparse_help_dense_and_changes_no_weight_against_another(
    world: tuple[list[TextStates], list[TextStates]],
) -> None:
    titles, texts = world
    group = make_group(titles, texts, mean=measure_mean(texts))
    head = fit_direction([group])
    scaled = fit_scale([group], head)
    ratio = scaled.bias / head.bias
    assert torch.allclose(scaled.weight, ratio * head.weight)
    dense, both = (measure_gains(sum_scores(group, scaled, (1, sparse, 0))).mean() for sparse in (0, 1))
    assert both > dense + 0.1

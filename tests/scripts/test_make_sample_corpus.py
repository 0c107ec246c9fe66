"""`scripts/make_sample_corpus.py`, run as a person runs it."""

import json
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_sample_corpus.py"
SCRIPT_NAMES = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "DEVANAGARI", "CJK", "HIRAGANA", "HANGUL", "HEBREW", "THAI")

pytest.importorskip("django")
pytest.importorskip("sphinx")


def make_corpus(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(out), *options], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "sample.jsonl"
    finished = make_corpus(path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
    return path


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]


def test_rows_have_the_documented_fields_and_unique_ids(rows: list[dict[str, str]]) -> None:
    assert 1500 <= len(rows) <= 3000
    assert all(list(row) == ["id", "title", "text", "lang", "source"] for row in rows)
    assert all(row["text"].strip() == row["text"] != "" for row in rows)
    assert all(row["id"].startswith(f"{row['source']}/{row['lang']}/") for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_many_languages_in_many_scripts(rows: list[dict[str, str]]) -> None:
    languages = Counter(row["lang"] for row in rows)
    assert len(languages) >= 10
    assert min(languages.values()) >= 20
    names = {unicodedata.name(character, "").split()[0] for row in rows for character in row["text"][:40]}
    assert set(SCRIPT_NAMES) - {name.split("-")[0] for name in names} == set()


def test_sentences_are_short_and_pages_are_long(rows: list[dict[str, str]]) -> None:
    pages = [row for row in rows if row["title"]]
    sentences = [row for row in rows if not row["title"]]
    assert min(len(row["text"]) for row in sentences) < 60
    assert sum(len(row["text"]) > 3000 for row in pages) >= 20


def test_text_reads_as_text(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert not any(torn in row["text"] for torn in ("%(", "%s", "%d", "``", "&amp;", "<br", "\n", "{}", "${")), row


def test_same_suffix_is_the_same_message(rows: list[dict[str, str]]) -> None:
    groups: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        groups[row["source"], row["id"].rsplit("/", 1)[1]][row["lang"]] = row["text"]
    blank = next(texts for texts in groups.values() if texts.get("en") == "This field cannot be blank.")
    assert blank["fr"] == "Ce champ ne peut pas être vide."
    assert blank["ja"] == "このフィールドは空ではいけません。"


def test_same_bytes_again(corpus: Path, tmp_path: Path) -> None:
    assert make_corpus(tmp_path / "again.jsonl").returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == corpus.read_bytes()


def test_number_of_documents_keeps_ids_and_texts(rows: list[dict[str, str]], tmp_path: Path) -> None:
    assert make_corpus(tmp_path / "few.jsonl", "--documents", "50").returncode == 0
    few = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {row["id"]: row["text"] for row in rows}
    assert len(few) == 50
    assert all(texts[row["id"]] == row["text"] for row in few)


def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finished = make_corpus(tmp_path / "file" / "sample.jsonl")
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert make_corpus(tmp_path / "none.jsonl", "--documents", "0").returncode == 2

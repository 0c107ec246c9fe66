"""The published protocol, end to end on a small stand-in in the benchmarks' own file layout, and resumed."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from evaluation.published import BENCHMARKS, METHODS, MissingData, draw_table
from tests.conftest import ROOT

# Of each: title, text, and a question in the same language that it answers.
DOCUMENTS = {
    "de": [
        (
            "Großer Panda",
            "Der Große Panda lebt in den Bergwäldern Chinas und frisst vor allem Bambus.",
            "Was frisst der Panda?",
        ),
        ("Donau", "Die Donau entspringt im Schwarzwald und mündet ins Schwarze Meer.", "Wo entspringt die Donau?"),
        (
            "Fotosynthese",
            "Pflanzen wandeln Licht, Wasser und Kohlendioxid in Zucker um.",
            "Wie machen Pflanzen Zucker?",
        ),
        (
            "Schach",
            "Beim Schach ist matt, wessen König angegriffen ist und nicht fliehen kann.",
            "Wann ist man im Schach matt?",
        ),
    ],
    "fr": [
        (
            "Panda géant",
            "Le panda géant vit dans les forêts de montagne de Chine et mange du bambou.",
            "Que mange le panda ?",
        ),
        (
            "Danube",
            "Le Danube prend sa source en Forêt-Noire et se jette dans la mer Noire.",
            "Où le Danube prend-il sa source ?",
        ),
        (
            "Photosynthèse",
            "Les plantes changent la lumière, l'eau et le gaz carbonique en sucre.",
            "Comment les plantes font-elles du sucre ?",
        ),
        (
            "Échecs",
            "Aux échecs est mat celui dont le roi est attaqué sans pouvoir fuir.",
            "Quand est-on mat aux échecs ?",
        ),
    ],
}


def write_miracl(data: Path) -> None:
    for lang, documents in DOCUMENTS.items():
        corpus = data / "miracl-corpus" / f"miracl-corpus-v1.0-{lang}"
        rest = data / "miracl" / f"miracl-v1.0-{lang}"
        for folder in (corpus, rest / "topics", rest / "qrels"):
            folder.mkdir(parents=True)
        for half in (0, 1):
            rows = [
                json.dumps({"docid": f"{number}#0", "title": title, "text": text}, ensure_ascii=False)
                for number, (title, text, _) in enumerate(documents)
                if number % 2 == half
            ]
            (corpus / f"docs-{half}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
        topics = "".join(f"{number}\t{question}\n" for number, (_, _, question) in enumerate(documents))
        (rest / "topics" / f"topics.miracl-v1.0-{lang}-dev.tsv").write_text(topics, encoding="utf-8")
        qrels = "".join(f"{number}\tQ0\t{number}#0\t1\n{number}\tQ0\t{(number + 1) % 4}#0\t0\n" for number in range(4))
        (rest / "qrels" / f"qrels.miracl-v1.0-{lang}-dev.tsv").write_text(qrels)


def write_mldr(data: Path) -> None:
    folder = data / "mldr-v1.0-de"
    folder.mkdir(parents=True)
    documents = [(f"doc-de-{number}", text, question) for number, (_, text, question) in enumerate(DOCUMENTS["de"])]
    corpus = [{"docid": name, "text": f"{text} " * 20} for name, text, _ in documents]
    queries = [
        {
            "query_id": f"q-de-{number}",
            "query": question,
            "positive_passages": [{"docid": name, "text": text}],
            "negative_passages": [{"docid": documents[number - 1][0], "text": documents[number - 1][1]}],
        }
        for number, (name, text, question) in enumerate(documents)
    ]
    for name, rows in (("corpus", corpus), ("test", queries)):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def reproduce(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluation.published", *map(str, arguments)]
    paths = {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1200, env={**os.environ, **paths}
    )


def read_table(stdout: str) -> dict[str, list[float]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in stdout.splitlines() if line[:1] == "|"]
    return {row[0]: [float(cell) for cell in row[1:]] for row in rows[2:]}


@pytest.mark.slow
def test_miracl_on_a_stand_in_and_again(demo_m3: Path, tmp_path: Path) -> None:
    write_miracl(tmp_path / "data")
    arguments = ("miracl", "--data", tmp_path / "data", "--model", demo_m3, "--work", tmp_path / "work")
    done = reproduce(*arguments, "--languages", "de,fr", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MIRACL dev, nDCG@10")
    table = read_table(done.stdout)
    assert list(table) == ["de", "fr", "average of 2"]
    assert table["de"][1::2] == list(BENCHMARKS["miracl"].scores["de"])
    for lang in ("de", "fr"):
        # Four documents on four matters: a model that finds anything at all finds these.
        assert table[lang][0] > 90
        assert all(0 < value <= 100 for value in table[lang])
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.trec")}
    folder = tmp_path / "work" / "de"
    assert sorted(path.relative_to(folder).as_posix() for path in runs if folder in path.parents) == [
        "dense+sparse-1_0.3_0.trec",
        "dense-1000.trec",
        "dense-float16/all-1_0.3_1.trec",
        "dense-float16/multi-vec-0_0_1.trec",
        "sparse-1000.trec",
    ]

    # One run is lost, and with it nothing else.
    lost = tmp_path / "work" / "de" / "sparse-1000.trec"
    lost.unlink()
    again = reproduce(*arguments, "--languages", "de,fr", "--device", "cpu")
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert {path for path, time in runs.items() if path.stat().st_mtime_ns != time} == {lost}


@pytest.mark.slow
def test_mldr_on_a_stand_in(demo_m3: Path, tmp_path: Path) -> None:
    write_mldr(tmp_path / "data")
    done = reproduce(
        *("mldr", "--data", tmp_path / "data", "--model", demo_m3, "--work", tmp_path / "work"),
        *("--max-length", 256, "--weights", "0.2,0.4,0.4", "--device", "cpu"),
        *("--candidates-by", "dense,sparse", "--colbert-dtype", "int8"),
    )
    assert done.returncode == 0, done.stderr
    table = read_table(done.stdout)
    assert list(table) == ["de", "average of 1"]
    assert table["de"] == table["average of 1"]
    assert table["de"][0] > 90
    assert (tmp_path / "work" / "de" / "dense+sparse-int8" / "all-0.2_0.4_0.4.trec").exists()


def test_a_command_that_fails_ends_the_script_with_its_code(tmp_path: Path) -> None:
    write_miracl(tmp_path / "data")
    done = reproduce(
        "miracl", "--data", tmp_path / "data", "--model", tmp_path / "nowhere", "--work", tmp_path / "work"
    )
    assert (done.returncode, done.stdout) == (5, "")
    assert "nowhere" in done.stderr
    assert "ended with exit code 5; the same command resumes there" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--languages", "de,xx"], "--languages xx: MIRACL has ar, bn"),
        (["--languages", "yo"], "has no miracl-corpus-v1.0-yo (also .gz, .zst)"),
    ],
)
def test_data_that_are_not_there(tmp_path: Path, arguments: Sequence[str], words: str) -> None:
    write_miracl(tmp_path / "data")
    done = reproduce("miracl", "--data", tmp_path / "data", "--work", tmp_path / "work", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_published_averages_are_those_of_the_languages(name: str) -> None:
    benchmark = BENCHMARKS[name]
    for place, average in enumerate(benchmark.average):
        of_languages = [scores[place] for scores in benchmark.scores.values()]
        assert sum(of_languages) / len(of_languages) == pytest.approx(average, abs=0.1)


def test_a_whole_table_has_the_published_average() -> None:
    benchmark = BENCHMARKS["mldr"]
    found = {lang: dict(zip(METHODS, scores, strict=True)) for lang, scores in benchmark.scores.items()}
    table = read_table(draw_table(benchmark, found))
    assert table["average of 13"][1::2] == list(benchmark.average)


def test_two_copies_of_a_file_are_refused(tmp_path: Path) -> None:
    write_mldr(tmp_path)
    (tmp_path / "mldr-v1.0-de" / "corpus.jsonl").write_text("{}")
    with pytest.raises(MissingData, match="leave one"):
        BENCHMARKS["mldr"].find_files(tmp_path, "de")

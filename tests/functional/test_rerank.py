"""`m3 rerank` as a command: the same scores as transformers, whichever way texts come, and what it says of gaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson
import pytest
import torch
from transformers import AutoTokenizer, XLMRobertaForSequenceClassification

from m3cli.cli.app import run
from tests.conftest import Completed

QUERIES = {"q1": "where do pandas live?", "q2": "狐狸"}
CORPUS = {
    "d1": ("China", "Pandas live in the mountains of China. " * 5),
    "d2": ("", "Ein Fuchs läuft durch den Wald."),
    "d3": ("Rivers", "Reka techet."),
    "d4": ("", "نص قصير"),
}
RUN = "q1 Q0 d1 1 9 t\nq1 Q0 d2 2 8 t\nq1 Q0 d3 3 7 t\nq1 Q0 d4 4 6 t\nq2 Q0 d2 1 2 t\nq2 Q0 d4 2 1 t\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"_id": name, "title": title, "text": text} for name, (title, text) in CORPUS.items()]
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    (tmp_path / "queries.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in QUERIES.items()))
    (tmp_path / "run.trec").write_text(RUN)
    return tmp_path


def parse(run: str) -> dict[tuple[str, str], float]:
    return {(row[0], row[2]): float(row[4]) for row in (line.split("\t") for line in run.splitlines())}


def score_by_transformers(cross_encoder: Path, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    model = XLMRobertaForSequenceClassification.from_pretrained(cross_encoder).train(mode=False)
    found = {}
    for query, document in pairs:
        passage = "\n".join(part for part in CORPUS[document] if part)
        inputs = tokenizer(QUERIES[query], passage, truncation="only_second", max_length=32, return_tensors="pt")
        with torch.inference_mode():
            found[query, document] = float(model(**inputs).logits[0, 0])
    return found


def test_a_run_in_a_new_order(m3: Callable[..., Completed], files: Path, cross_encoder: Path, tiny_m3: Path) -> None:
    flags = ("--model", cross_encoder, "--queries", "queries.tsv", "--dtype", "float32", "--max-length", 32)
    done = m3("rerank", "run.trec", "--corpus", "corpus.jsonl", "--top-k", 3, *flags, M3_MODEL="nowhere")
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(row[0], row[3], row[5]) for row in rows] == [
        *(("q1", str(rank), "m3-rerank") for rank in (1, 2, 3)),
        *(("q2", str(rank), "m3-rerank") for rank in (1, 2)),
    ]
    found = parse(done.stdout)
    assert set(found) == {("q1", "d1"), ("q1", "d2"), ("q1", "d3"), ("q2", "d2"), ("q2", "d4")}
    assert [float(row[4]) for row in rows[:3]] == sorted((float(row[4]) for row in rows[:3]), reverse=True)
    assert found == pytest.approx(score_by_transformers(cross_encoder, found), abs=1e-4)
    assert "5 pairs" in done.stderr
    assert "truncated: 0 queries, the passages of 1 pair" in done.stderr

    # The same texts from a folder, the run from a pipe, the result in a file, scores from 0 to 1.
    encoded = m3("encode", "corpus.jsonl", "--model", tiny_m3, "--outputs", "dense", "--keep-text")
    assert encoded.returncode == 0
    again = m3(
        *("rerank", "-", "--corpus", "corpus.m3", "--top-k", 3, *flags, "--normalise", "--out", "new.trec"),
        stdin=RUN.encode(),
    )
    assert (again.returncode, again.stdout) == (0, "")
    for pair, share in parse((files / "new.trec").read_text()).items():
        assert share == pytest.approx(1 / (1 + math.exp(-found[pair])), abs=1e-5)


def test_candidates_without_text_are_left_out_and_counted(
    m3: Callable[..., Completed], files: Path, cross_encoder: Path
) -> None:
    (files / "run.trec").write_text(RUN + "q1 Q0 gone 5 1 t\nq3 Q0 d1 1 1 t\nq3 Q0 d2 2 1 t\n")
    flags = ("--model", cross_encoder, "--queries", "queries.tsv", "--corpus", "corpus.jsonl")
    done = m3("rerank", "run.trec", *flags)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 6
    assert "3 candidates are not in the new run: " in done.stderr
    assert "2 of a query without text (such as q3)" in done.stderr
    assert "1 without text (such as gone of query q1)" in done.stderr


def test_a_title_of_a_query_is_not_read_to_the_reranker(
    files: Path, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `m3 search` encodes queries."""
    monkeypatch.chdir(files)
    found = []
    for title in ("", "A title that changes the score"):
        rows = [{"_id": name, "title": title, "text": text} for name, text in QUERIES.items()]
        (files / "queries.jsonl").write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
        flags = ("--model", str(cross_encoder), "--queries", "queries.jsonl", "--corpus", "corpus.jsonl")
        assert run(["rerank", "run.trec", "--progress", "none", "--dtype", "float32", *flags]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"--model": "{tiny}"}, 5, "it scores no pairs; give a cross-encoder"),
        ({"--model": "org/none"}, 5, "reached: hf download org/none --local-dir none, then --model none"),
        ({"--max-length": "9000"}, 2, "--max-length 9000: cross-encoder holds at most 8192 tokens"),
        ({"--queries": "corpus.jsonl"}, 4, "--queries corpus.jsonl has none of the queries of run.trec (such as 'q1')"),
        ({"--corpus": "queries.tsv"}, 4, "--corpus queries.tsv has none of the documents of run.trec (such as 'd1')"),
        ({"--corpus": "-"}, 2, "--corpus -: texts are looked up by id"),
        ({"--queries": "nowhere"}, 4, "nowhere: no such file"),
        ({"--out": "no/such/file.trec"}, 6, "cannot write no/such/file.trec: there is no folder"),
        ({"--out": "no/such/file.trec", "--model": "nowhere"}, 6, "there is no folder"),
        ({"--out": "file"}, 2, "--out file: its ending tells the format"),
        ({"--queries": "corpus.jsonl", "--query-field": "words"}, 4, "correct --query-field"),
        ({"--queries": "corpus.jsonl", "--query-id-field": "key"}, 4, "correct --query-id-field"),
        ({"--corpus": "corpus.jsonl", "--text-field": "words"}, 4, "correct --text-field"),
        (
            {"--corpus": "corpus.jsonl", "--id-field": ""},
            2,
            "a known name for ids; name it with --id-field",
        ),
    ],
)
def test_what_is_refused_ends_in_one_line(
    files: Path,
    cross_encoder: Path,
    tiny_m3: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(files)
    flags = {"--model": str(cross_encoder), "--queries": "queries.tsv", "--corpus": "corpus.jsonl", **changed}
    arguments = [part.format(tiny=tiny_m3) for flag in flags.items() for part in flag]
    assert run(["rerank", "run.trec", "--progress", "none", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.splitlines()) == 1

"""`m3 eval` as a command: what stands on which stream, exit codes, and that bad input is one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from m3cli.cli.app import run
from tests.conftest import Completed

NAMES = ["nDCG@10", "Recall@100", "MRR@10", "MAP"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "one.trec").write_text("q1 Q0 a 1 3 t\nq1 Q0 b 2 2 t\nq2 Q0 c 1 1 t\nq9 Q0 c 1 1 t\n")
    (tmp_path / "two.trec.gz").write_bytes(gzip.compress(b"q1 Q0 b 1 3 t\nq1 Q0 a 2 2 t\n"))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tb\t1\nq2\tc\t2\nq3\tc\t0\n")
    return tmp_path


def test_one_run_as_tsv(m3: Callable[..., Completed], files: Path) -> None:
    done = m3("eval", "one.trec", "qrels.tsv")
    assert done.returncode == 0
    header, row = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["run", *NAMES]
    assert row[0] == "one.trec"
    # q1 has its document at rank 2, q2 at rank 1, q3 has none.
    assert list(map(float, row[1:])) == pytest.approx([(0.63093 + 1) / 3, 2 / 3, 0.5, 0.5], abs=1e-4)
    assert "3 judged queries in qrels.tsv" in done.stderr
    assert "1 of them without a relevant document" in done.stderr
    assert "one.trec lacks 1 judged query, counted as 0" in done.stderr
    assert "one.trec has 1 query without judgements" in done.stderr


def test_runs_side_by_side(m3: Callable[..., Completed], files: Path) -> None:
    done = m3("eval", "one.trec", "two.trec.gz", "qrels.tsv")
    assert done.returncode == 0
    header, first, second = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["run", *NAMES, *(f"p({name})" for name in NAMES)]
    assert first[5:] == [""] * 4
    assert all(0 < float(p) <= 1 for p in second[5:])


def test_json_and_other_measures(m3: Callable[..., Completed], files: Path) -> None:
    judgements = (files / "qrels.tsv").read_bytes()
    done = m3("eval", "one.trec", "two.trec.gz", "-", "--measures", "Success@1,P@2", "--json", stdin=judgements)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["queries"], found["without_relevant"]) == (3, 1)
    one, two = found["runs"]
    assert one["measures"] == pytest.approx({"Success@1": 1 / 3, "P@2": 1 / 3})
    assert two["measures"] == pytest.approx({"Success@1": 1 / 3, "P@2": 1 / 6})
    assert (one["p"], one["missing"], one["not_judged"], two["missing"]) == (None, 1, 1, 2)
    assert set(two["p"]) == {"Success@1", "P@2"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["one.trec"], 2, "only one.trec: give one or more runs, then the file of judgements"),
        (["one.trec", "one.trec", "qrels.tsv"], 2, "one.trec is named twice"),
        (["one.trec", "qrels.tsv", "--measures", "nDCG@ten"], 2, "--measures 'nDCG@ten': not known"),
        (["nowhere.trec", "qrels.tsv"], 4, "nowhere.trec: no such file"),
        (["qrels.tsv", "two.trec.gz"], 4, "two.trec.gz line 1: 6 columns without a known header"),
        (["one.trec", "others.tsv"], 4, "one.trec: none of its queries (such as 'q1') is in others.tsv (such as 'x1')"),
        (["broken.trec", "qrels.tsv"], 4, "broken.trec line 2: 4 columns, not 6; expected 'query Q0"),
    ],
)
def test_what_is_refused_ends_in_one_line(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(files)
    (files / "others.tsv").write_text("x1 0 a 1\n")
    (files / "broken.trec").write_text("q1 Q0 a 1 3 t\nq1 Q0 b 2\n")
    assert run(["eval", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.splitlines()) == 1

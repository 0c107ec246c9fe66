"""`m3 score` as a command: streams, exit codes, what it says of bad input, and that ids need no model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.cli.app import run
from tests.conftest import ROOT, Completed

COLUMNS = ["query", "passage", "dense", "sparse", "colbert", "sparse+dense", "colbert+sparse+dense"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("the quick fox\ta quick brown fox\nthe quick fox\t\n狐狸 fox\t数据 fox\n", encoding="utf-8")
    return path


def test_pairs_to_standard_output(m3: Callable[..., Completed], tiny_m3: Path, pairs: Path) -> None:
    done = m3("score", "pairs.tsv", "--model", tiny_m3, "--weights", "0.4,0.2,0.4")
    assert done.returncode == 3
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == COLUMNS
    assert [row[:2] for row in rows] == [line.split("\t") for line in pairs.read_text().splitlines()]
    assert rows[1][2:] == ["", "", "", "", ""]
    dense, sparse, _, both, _ = map(float, rows[0][2:])
    assert both == pytest.approx((0.4 * dense + 0.2 * sparse) / 0.6, abs=2e-6)
    assert "1 of 3 rows have no scores: 1 empty passage (row 2)" in done.stderr
    assert "Traceback" not in done.stderr


def test_pipe_in_and_file_out(m3: Callable[..., Completed], tiny_m3: Path, pairs: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    arguments = ("--model", tiny_m3, "--modes", "dense,sparse", "--progress", "none", "--out", "scores.jsonl")
    done = m3("score", "-", *arguments, stdin=pairs.read_bytes())
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in rows] == [["query", "passage", "dense", "sparse"]] * 3
    assert set(tmp_path.iterdir()) - before == {tmp_path / "scores.jsonl"}, "no temporary file stays"


def test_explain_as_json(m3: Callable[..., Completed], tiny_m3: Path, pairs: Path) -> None:
    done = m3("score", pairs, "--model", tiny_m3, "--dtype", "float32", "--explain")
    assert done.returncode == 3
    first, bad, _ = map(json.loads, done.stdout.splitlines())
    total = sum(shared["product"] for shared in first["shared_tokens"])
    assert total == pytest.approx(first["scores"]["sparse"], abs=1e-4)
    matches = [match["similarity"] for match in first["best_matches"]]
    assert sum(matches) / len(matches) == pytest.approx(first["scores"]["colbert"], abs=1e-4)
    tokens = [match["query_token"] for match in first["best_matches"]]
    assert (tokens[0], tokens[-1]) == ("the", "</s>")
    assert (bad["fault"], bad["scores"]["dense"]) == ("empty passage", None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--weights", "1,x,1"], 2, "--weights '1,x,1': expected three numbers"),
        (["--weights", "0,0,0"], 2, "they sum to 0"),
        (["--weights", "1e308,1e308,1e308"], 2, "expected three numbers from 0 to"),
        (["--weights", "1,2"], 2, "expected three numbers"),
        (["--weights", "nan,1,1"], 2, "expected three numbers"),
        (["--modes", "dense,bm25"], 2, "--modes 'dense,bm25'"),
        (["--chunks", "last"], 2, "--chunks 'last'"),
        (["--chunks", "mean"], 2, "--chunks mean with pairs of texts: only documents of folders have chunks"),
        (["--dtype", "float8"], 2, "--dtype 'float8'"),
        (["--out", "scores.csv"], 2, "ending tells the format"),
        (["--query-field", "nosuch"], 4, "no column 'nosuch'"),
        (["--queries", "Q.m3"], 2, "--queries without --corpus"),
        (["--model", "nowhere"], 5, "nowhere"),
    ],
)
def test_what_is_refused_ends_in_one_line(
    pairs: Path, tiny_m3: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert run(["score", str(pairs), "--model", str(tiny_m3), *arguments]) == code
    written = capsys.readouterr()
    assert words in written.err
    assert len(written.err.splitlines()) == 1
    assert written.out == ""


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_a_damaged_folder_ends_in_one_line(
    m3_here: Callable[..., Completed], tiny_m3: Path, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "a fox"}\n{"id": "b", "text": "a dog"}\n')
    assert m3_here("encode", "c.jsonl", "--model", tiny_m3, "--quiet").returncode == 0
    (tmp_path / "p.tsv").write_text("query\tpassage\na\tb\n")
    rows = tmp_path / "c.m3/rows/shard-0000000.parquet"
    rows.unlink()
    rows.touch()
    done = m3_here("score", "p.tsv", "--queries", "c.m3", "--corpus", "c.m3", "--out", f"s.{ending}")
    assert (done.returncode, done.stderr.count("\n")) == (12, 1), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "c.m3", "p.tsv"]


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_dates_that_python_cannot_represent_are_kept(
    m3_here: Callable[..., Completed], tiny_m3: Path, tmp_path: Path, ending: str
) -> None:
    far, zone = pa.array([1 << 60], pa.timestamp("ms")), pa.array([7], pa.timestamp("s", "Mars/Base"))
    pq.write_table(pa.table({"query": ["a"], "passage": ["b"], "far": far, "zone": zone}), tmp_path / "p.parquet")
    done = m3_here("score", "p.parquet", "--model", tiny_m3, "--out", f"s.{ending}")
    assert done.returncode == 0, done.stderr
    if ending == "parquet":
        assert pq.read_table(tmp_path / "s.parquet").column("far").equals(pa.chunked_array([far]))
    else:
        assert str(1 << 60) in (tmp_path / f"s.{ending}").read_text()


def test_ids_load_no_model_and_no_torch(tiny_m3: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(f'{{"id":"{n}","text":"text number {n}"}}\n' for n in range(4)), encoding="utf-8")
    folder = tmp_path / "c.m3"
    assert run(["encode", str(corpus), "--model", str(tiny_m3), "--out", str(folder), "--progress", "none"]) == 0
    (tmp_path / "ids.tsv").write_text("0\t1\n2\t3\n", encoding="utf-8")
    code = (
        "import sys; from m3cli.cli.app import run; code = run(sys.argv[1:]); "
        "print(*({'torch', 'transformers', 'tokenizers'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    arguments = ["score", "ids.tsv", "--queries", str(folder), "--corpus", str(folder), "--progress", "none"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == ""
    assert len(done.stdout.splitlines()) == 3


def test_a_closed_pipe_ends_quietly(tiny_m3: Path, pairs: Path) -> None:
    command = [sys.executable, "-m", "m3cli", "score", str(pairs), "--model", str(tiny_m3), "--progress", "none"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 0

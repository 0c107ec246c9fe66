"""The snippets of README.md and of the store's page run, and all of them read the same numbers."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from m3cli.retrieval.scores import decode_vectors
from m3cli.store.reader import open_folder, read_shard
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

PAGES = (ROOT / "README.md", ROOT / "m3cli" / "store" / "README.md")
"pages whose snippets are run"


def find_blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return the blocks of a page that are marked to be run, with the line above the mark."""
    pattern = rf"^([^\n]*)\n<!-- run -->\n```{language}\n(.*?)```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


FRONT = find_blocks(PAGES[0], "python")
FOUND = find_blocks(PAGES[1], "python")
SNIPPETS, COLBERT_SNIPPETS = FOUND[:5], FOUND[5:]


@pytest.fixture(scope="module")
def folders(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.m3 and npy.m3, made from the sample corpus by the real command."""
    place = tmp_path_factory.mktemp("readme")
    subprocess.run([sys.executable, ROOT / "scripts/make_sample_corpus.py", place / "corpus.jsonl"], check=True)
    common = ["corpus.jsonl", "--model", str(tiny_m3), "--limit", "400", "--shard-size", "16K", "--progress", "none"]
    common += ["--keep-text"]
    for arguments in ([], ["--format", "npy", "--out", "npy.m3"]):
        subprocess.run([sys.executable, "-m", "m3cli", "encode", *common, *arguments], check=True, cwd=place)
    common[0] = "../corpus.jsonl"
    for dtype in ("int8", "binary"):
        (place / dtype).mkdir()
        for arguments in (["--out", "corpus.m3"], ["--format", "npy", "--out", "npy.m3"]):
            words = [*common, "--limit", "20", "--colbert-dtype", dtype, *arguments]
            subprocess.run([sys.executable, "-m", "m3cli", "encode", *words], check=True, cwd=place / dtype)
    return place


def run_snippet(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_page_reads_a_folder_in_five_ways() -> None:
    assert [name.split(",")[0] for name, _ in SNIPPETS] == [
        "pyarrow",
        "polars",
        "DuckDB",
        "Hugging Face datasets",
        "numpy and scipy",
    ]


@pytest.mark.parametrize(("name", "code"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_snippet_reads_the_same_numbers(
    name: str, code: str, folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    expected, read = run_snippet(SNIPPETS[0][1]), run_snippet(code)
    assert read["dense"].shape == (expected["table"].num_rows, 64)
    assert np.array_equal(read["dense"], expected["dense"])
    assert read["weights"] == pytest.approx(expected["weights"], abs=0)
    assert len(read["weights"]) > 3
    assert np.array_equal(read["matrix"], expected["matrix"])
    assert len(read["matrix"]) == expected["table"]["num_tokens"][0].as_py() - 1


def test_every_python_snippet_is_run() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```python\n") == len(find_blocks(page, "python"))
    assert [name for name, _ in COLBERT_SNIPPETS] == [
        "numpy and pyarrow, whatever the vectors are stored as",
        "numpy, with `--format npy`",
    ]


@pytest.mark.parametrize(("name", "code"), FRONT, ids=[name for name, _ in FRONT])
def test_snippet_of_the_front_page_reads_the_same_numbers(
    name: str, code: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    expected, read = run_snippet(SNIPPETS[0][1]), run_snippet(code)
    assert np.array_equal(read["dense"], expected["dense"])
    if "matrix" in read:
        assert np.array_equal(read["matrix"], expected["matrix"])
        assert read["weights"] == pytest.approx(expected["weights"], abs=0)


def test_the_query_in_sql_finds_the_sentence_itself_first(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    ((_, query),) = find_blocks(PAGES[0], "sql")
    ids = [row[0] for row in duckdb.execute("SELECT id FROM 'corpus.m3/rows/*.parquet'").fetchall()]
    # The corpus is cut short here, so another sentence is asked for.
    found = duckdb.execute(query.replace("django/auth/en/0070", ids[0])).fetchall()
    assert len(found) == 8
    assert found[0][:2] == (pytest.approx(1, abs=1e-3), ids[0])


def test_the_commands_of_the_front_page_run(tiny_m3: Path, tmp_path: Path) -> None:
    rows = [{"id": f"d{number}", "text": f"Document {number} about passwords."} for number in range(4)]
    queries = [{"id": "q1", "text": "A question about passwords?"}]
    for stem, each in (("corpus", rows), ("queries", queries)):
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (tmp_path / "big.jsonl.gz").write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes()))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    (tmp_path / "pairs.tsv").write_text("What is it?\tA password.\n")
    command = tmp_path / "bin" / "m3"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m m3cli "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "M3_MODEL": str(tiny_m3)}
    blocks = find_blocks(PAGES[0], "sh")
    assert len(blocks) == 2
    for _, code in blocks:
        words = ["bash", "-eo", "pipefail", "-c", code]
        environment = {**os.environ, **paths}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
@pytest.mark.parametrize(("name", "code"), COLBERT_SNIPPETS, ids=[name for name, _ in COLBERT_SNIPPETS])
def test_snippet_decodes_what_vectors_are_stored_as(
    name: str, code: str, dtype: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders / ("" if dtype == "float16" else dtype))
    read = run_snippet(code)["matrix"].astype(np.float32)
    stored = read_shard(open_folder(Path("npy.m3" if "npy" in name else "corpus.m3")), 0).embeddings.colbert_vecs
    assert stored is not None
    assert np.allclose(read, decode_vectors(stored, slice(stored.indptr[0], stored.indptr[1])), atol=1e-6)
    monkeypatch.chdir(folders)
    exact = run_snippet(SNIPPETS[0][1])["matrix"].astype(np.float32)
    cosines = (read * exact).sum(axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.min() > {"float16": 0.999, "int8": 0.999, "binary": 0.6}[dtype]

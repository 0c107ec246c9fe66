"""Every Python snippet of the README runs, and all of them read the same numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3cli.retrieval.maxsim import decode_vectors
from m3cli.store.reader import open_folder, read_shard
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

README = (ROOT / "README.md").read_text()
FOUND = re.findall(r"^([^\n]+)\n<!-- run -->\n```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)
SNIPPETS, COLBERT_SNIPPETS = FOUND[:5], FOUND[5:]


@pytest.fixture(scope="module")
def folders(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.m3 and npy.m3, made from the sample corpus by the real command."""
    place = tmp_path_factory.mktemp("readme")
    subprocess.run([sys.executable, ROOT / "scripts/make_sample_corpus.py", place / "corpus.jsonl"], check=True)
    common = ["corpus.jsonl", "--model", str(tiny_m3), "--limit", "400", "--shard-size", "16K", "--progress", "none"]
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


def test_the_readme_reads_with_all_five_ways() -> None:
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
    assert README.count("```python\n") == len(FOUND)
    assert [name for name, _ in COLBERT_SNIPPETS] == [
        "numpy and pyarrow, whatever the vectors are stored as",
        "numpy, with `--format npy`",
    ]


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


def test_the_picture_is_there_and_shows_a_run() -> None:
    picture = (ROOT / "scripts" / "pictures" / "encode.svg").read_text()
    assert "<svg" in picture
    assert "fingerprint" in picture

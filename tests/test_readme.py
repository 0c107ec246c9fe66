"""Every Python snippet of the README runs, and all of them read the same numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^([^\n]+)\n<!-- run -->\n```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folders(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.m3 and npy.m3, made from the sample corpus by the real command."""
    place = tmp_path_factory.mktemp("readme")
    subprocess.run([sys.executable, ROOT / "scripts/make_sample_corpus.py", place / "corpus.jsonl"], check=True)
    common = ["corpus.jsonl", "--model", str(tiny_m3), "--limit", "400", "--shard-size", "16K", "--progress", "none"]
    for arguments in ([], ["--format", "npy", "--out", "npy.m3"]):
        subprocess.run([sys.executable, "-m", "m3cli", "encode", *common, *arguments], check=True, cwd=place)
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


def test_the_picture_is_there_and_shows_a_run() -> None:
    picture = (ROOT / "scripts" / "pictures" / "encode.svg").read_text()
    assert "<svg" in picture
    assert "fingerprint" in picture

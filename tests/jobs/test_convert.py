"""`m3 convert`: an ONNX model that gives m3's numbers and rankings, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import m3cli
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.onnx import OnnxSession
from m3cli.errors import ModelError, OutputError, UsageError
from m3cli.jobs import convert as job
from m3cli.jobs.convert import CHECK_TEXTS, convert_checkpoint, to_sparse
from m3cli.progress import Progress
from m3cli.requests import ConvertRequest
from tests.conftest import Completed, build_sample

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install 'm3cli[onnx]')"
)


def convert(model: Path, out: Path, *, to: str = "onnx") -> None:
    convert_checkpoint(ConvertRequest(model=str(model), to=to, out=str(out)), progress=Progress("none"))


def test_the_check_has_32_texts_of_different_lengths() -> None:
    assert len(set(CHECK_TEXTS)) == 32
    assert len({len(text.split()) for text in CHECK_TEXTS}) > 16


def test_a_sparse_vector_has_the_largest_weight_of_each_token() -> None:
    ids, weights = np.array([0, 7, 9, 7, 2, 1]), np.array([5.0, 0.25, 0.0, 0.5, 3.0, 0.0])[:, None]
    assert to_sparse(ids, weights) == {7: 0.5}


def test_errors_name_the_remedy(tiny_m3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--to tensorrt: expected onnx"):
        convert(tiny_m3, tmp_path / "out", to="tensorrt")
    monkeypatch.setattr(job, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UsageError, match=r"needs the package onnxscript: pip install 'm3cli\[onnx\]'"):
        convert(tiny_m3, tmp_path / "out")
    monkeypatch.setattr(job, "find_spec", lambda name: name)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="not an empty folder"):
            convert(tiny_m3, taken)


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nothing_is_written_if_the_numbers_differ(
    tiny_m3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OnnxSession.run

    def run_badly(self: OnnxSession, texts: Any) -> Any:
        ids, made = run(self, texts)
        return ids, {**made, "sparse_vecs": made["sparse_vecs"] * 1.5}

    monkeypatch.setattr(OnnxSession, "run", run_badly)
    with pytest.raises(ModelError, match="sparse_vecs differ from m3's"):
        convert(tiny_m3, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_queries_in_onnxruntime_find_what_m3_search_finds(
    demo_m3: Path, tmp_path: Path, m3: Callable[..., Completed]
) -> None:
    made = m3("convert", demo_m3, "--to", "onnx", "--out", "onnx")
    assert made.returncode == 0, made.stderr
    assert "onnxruntime gives m3's numbers on 32 texts" in made.stderr
    out = tmp_path / "onnx"
    assert {"model.onnx", "tokenizer.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert "def to_sparse(" in (out / "README.md").read_text()
    options = ("--limit", 120, "--max-length", 64, "--model", demo_m3)
    assert m3("encode", build_sample(), "--out", "c.m3", *options).returncode == 0
    folder = m3cli.open_folder(tmp_path / "c.m3")
    model = m3cli.load_model(demo_m3, device="cpu", dtype="float32")
    with build_sample().open(encoding="utf-8") as file:
        queries = [json.loads(line)["text"][:80] for line, _ in zip(file, range(8), strict=False)]
    ids, outputs = OnnxSession(out, read_checkpoint(demo_m3)).run(queries)
    lexical = folder.sparse
    for number in range(len(queries)):
        weights = np.zeros(folder.vocabulary, np.float32)
        sparse = to_sparse(ids[number], outputs["sparse_vecs"][number])
        weights[list(sparse)] = list(sparse.values())
        vectors = outputs["colbert_vecs"][number][: int((ids[number] != 1).sum()) - 1]
        scores = {
            "dense": folder.dense.astype(np.float32) @ outputs["dense_vecs"][number],
            "sparse": lexical @ weights,
            "colbert": np.array([(vectors @ folder.colbert(row).T).max(1).mean() for row in range(len(folder))]),
        }
        best: dict[str, dict[str, float]] = {}
        for mode, values in scores.items():
            best[mode] = {}
            for name, value in zip(folder.ids, values.tolist(), strict=True):
                best[mode][name] = max(value, best[mode].get(name, 0.0))
        best["hybrid"] = {name: sum(best[mode][name] for mode in scores) / 3 for name in best["dense"]}
        for mode, found in best.items():
            hits = folder.search([queries[number]], mode=mode, top_k=10, model=model)[0]  # type: ignore[arg-type]
            top = sorted((score, name) for name, score in found.items() if score > 0)[:-11:-1]
            assert list(hits.ids) == [name for _, name in top], mode
            assert np.allclose(hits.scores, [score for score, _ in top], atol=1e-4)

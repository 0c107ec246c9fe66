"""`m3cli.open_folder`: arrays, texts and search of a folder, in both formats and every ColBERT form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import m3cli
from m3cli.errors import ForeignFolder, UsageError
from m3cli.records import QueryHits
from m3cli.store.layout import done_name
from tests.conftest import ROOT, Completed
from tests.exporters.folders import DIM, VOCABULARY, Doc, write_folder

SHARDS = [
    [Doc("a", "first text"), Doc("b", "second text", chunks=2, vectors=4), Doc("c", "no weights", weights=0)],
    [],
    [Doc("d", "日本語 text", vectors=1)],
]
ROWS = ["fox and dog", "数据 中文", "nothing of it", "a quick fox", "dog. " * 40]


@pytest.mark.parametrize("form", ["float16", "int8", "binary"])
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_arrays_are_those_of_the_folder(
    tmp_path: Path,
    format: Any,  # noqa: A002  the flag's name
    form: Literal["float16", "int8", "binary"],
) -> None:
    folder = m3cli.open_folder(write_folder(tmp_path / "c.m3", SHARDS, format=format, colbert_dtype=form))
    exact = m3cli.open_folder(write_folder(tmp_path / "e.m3", SHARDS))
    assert len(folder) == 5
    assert folder.complete
    assert folder.ids == ["a", "b", "b", "c", "d"]
    assert folder.dense.shape == (5, DIM)
    assert folder.dense.dtype == np.float16
    assert folder.sparse.shape == (5, VOCABULARY)
    assert np.diff(folder.sparse.indptr).tolist()[3] == 0
    parts = list(folder.parts())
    assert [part.shard for part in parts] == [0, 2]
    assert sum(part.rows.num_rows for part in parts) == 5
    assert [folder.text(row) for row in (0, 3, 4, -1)] == ["first text", "no weights", "日本語 text", "日本語 text"]
    for row in (4, 0, 1, 2, 3, -5):
        vectors, wanted = folder.colbert(row), exact.colbert(row)
        assert vectors.dtype == np.float32
        assert vectors.shape == wanted.shape
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
        assert (vectors * wanted).sum(1).min() > {"float16": 0.999, "int8": 0.99, "binary": 0.5}[form]
    with pytest.raises(IndexError, match=r"row 5: c\.m3 has 5 rows"):
        folder.colbert(5)


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_to_arrow_is_the_table_of_the_parquet_format(tmp_path: Path, form: Literal["float16", "int8"]) -> None:
    plain = write_folder(tmp_path / "p.m3", SHARDS, colbert_dtype=form)
    arrays = write_folder(tmp_path / "n.m3", SHARDS, format="npy", colbert_dtype=form)
    stored = pa.concat_tables([pq.read_table(path) for path in sorted((plain / "rows").glob("*.parquet"))])
    for path in (plain, arrays):
        table = m3cli.open_folder(path).to_arrow()
        assert table.schema.equals(stored.schema)
        assert table.equals(stored)
        assert table.schema.field("colbert_vecs").metadata == stored.schema.field("colbert_vecs").metadata


def test_an_unfinished_folder_has_what_is_done(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "c.m3", SHARDS, finish=False)
    (path / done_name(0)).unlink()
    folder = m3cli.open_folder(path)
    assert not folder.complete
    assert folder.ids == ["d"]
    assert folder.text(0) == "日本語 text"
    assert folder.dense.shape == (1, DIM)


def test_an_empty_folder_has_empty_arrays(tmp_path: Path) -> None:
    folder = m3cli.open_folder(write_folder(tmp_path / "c.m3", [[]]))
    assert (len(folder), folder.ids, folder.dense.shape) == (0, [], (0, DIM))
    assert folder.sparse.shape == (0, VOCABULARY)
    assert folder.to_arrow().num_rows == 0
    assert [len(hits.ids) for hits in folder.search(["a", "b"])] == [0, 0]


def test_missing_outputs_texts_and_folders_are_errors(tmp_path: Path) -> None:
    folder = m3cli.open_folder(write_folder(tmp_path / "c.m3", SHARDS, outputs=("dense",), keep_text=False))
    for read in (lambda: folder.sparse, lambda: folder.colbert(0)):
        with pytest.raises(UsageError, match=r"c\.m3 has no (sparse|colbert), only dense"):
            read()
    with pytest.raises(UsageError, match="--keep-text"):
        folder.text(0)
    with pytest.raises(UsageError, match="no such folder"):
        m3cli.open_folder(tmp_path / "missing.m3")


def test_wrong_arguments_are_errors(tmp_path: Path) -> None:
    folder = m3cli.open_folder(write_folder(tmp_path / "c.m3", SHARDS))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mode": "vectors"}, "mode='vectors': expected one of dense, sparse"),
        ({"level": "rows"}, "level='rows': expected one of document, chunk"),
        ({"top_k": 0}, "top_k=0: expected an integer of at least 1"),
        ({"weights": (1, 2)}, "expected three numbers, of dense, sparse and colbert"),
    ]
    for arguments, words in wrong:
        with pytest.raises(UsageError, match=words):
            folder.search(["a"], **arguments)
    with pytest.raises(ValueError, match="query 1 is empty"):
        folder.search(["a", " "])
    vectors: Any = ["dense_vecs"]
    with pytest.raises(UsageError, match="outputs='dense_vecs': expected one of dense, sparse, colbert"):
        folder.parts(outputs=vectors)


def test_reading_arrays_loads_no_torch(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "c.m3", SHARDS)
    code = (
        "import sys, m3cli; folder = m3cli.open_folder(sys.argv[1]); "
        "print(len(folder), folder.dense.shape, folder.sparse.shape, folder.text(0), file=sys.stderr); "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.split("\n")[0] == f"5 (5, {DIM}) (5, {VOCABULARY}) first text"
    assert {"torch", "transformers"}.isdisjoint(done.stdout.split())


@pytest.mark.slow
def test_search_is_that_of_the_command_line(tiny_m3: Path, m3: Callable[..., Completed], tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate(ROWS)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    queries = ["a quick fox", "数据"]
    (tmp_path / "q.txt").write_text("\n".join(queries) + "\n", encoding="utf-8")
    made = m3("encode", "c.jsonl", "--model", tiny_m3, "--max-length", 32, "--keep-text", "--dtype", "float32")
    assert made.returncode == 0, made.stderr
    model = m3cli.load_model(tiny_m3, dtype="float32")
    folder = m3cli.open_folder(tmp_path / "c.m3")
    options = ("--top-k", 3, "--format", "jsonl", "--dtype", "float32")
    found = m3("search", "c.m3", "-q", "q.txt", *options, M3_MODEL=str(tiny_m3))
    assert found.returncode == 0, found.stderr
    hits = folder.search(queries, top_k=3, model=model)
    for line, mine in zip(found.stdout.splitlines(), hits, strict=True):
        wanted = json.loads(line)["hits"]
        assert [hit["id"] for hit in wanted] == list(mine.ids)
        assert np.allclose([hit["score"] for hit in wanted], mine.scores, atol=1e-5)
    terms = folder.search("quick fox", mode="bm25", top_k=3, model=tiny_m3)[0]
    assert terms.ids[0] == "d3"
    with_path = folder.search("a quick fox", mode="hybrid", top_k=3, model=tiny_m3)
    assert isinstance(with_path[0], QueryHits)
    assert with_path[0].ids == hits[0].ids
    assert with_path[0].texts[0] is not None


def test_search_with_another_model_is_an_error(tiny_m3: Path, tmp_path: Path) -> None:
    folder = m3cli.open_folder(write_folder(tmp_path / "c.m3", SHARDS))
    with pytest.raises(ForeignFolder, match="mean nothing"):
        folder.search(["a"], model=m3cli.load_model(tiny_m3, dtype="float32"))
    with pytest.raises(UsageError, match="M3_MODEL"):
        folder.search(["a"])
    with pytest.raises(UsageError, match="is for --mode hybrid"):
        folder.search(["a"], mode="dense", weights=(1, 1, 1), model=tiny_m3)

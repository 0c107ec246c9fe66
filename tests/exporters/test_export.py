"""`m3 export`: what is written, what is left out, and going on after a death."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.cli.app import run
from m3cli.store.reader import iter_parts, open_folder
from tests.conftest import ROOT, Completed
from tests.crash import crash_at, folder_bytes
from tests.exporters.folders import DIM, Doc, write_folder

TARGETS = ["parquet", "npy", "faiss", "milvus", "pgvector", "elasticsearch", "opensearch", "vespa"]
SHARDS = [
    [Doc("a", "first"), Doc("b", "a longer text", chunks=3), Doc('c"\n\t#/%', "third")],
    [],
    [Doc("a", "again"), Doc("é 中文 😀", "fourth", weights=0, vectors=9), Doc("b#1", "clashes with a chunk of b")],
]
ROWS = 6
"of SHARDS, without the two whose key an earlier row has"


@pytest.fixture
def export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Completed]:
    """`m3 export` in this process."""

    def export(*arguments: object) -> Completed:
        capfd.readouterr()
        code = run(["export", *map(str, arguments)])
        shown = capfd.readouterr()
        return Completed([], code, shown.out, shown.err)

    return export


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "corpus.m3", SHARDS)


def left_out(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "left-out.jsonl").read_bytes().splitlines()]


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder has, by key, decoded; of several rows of one key the first."""
    rows: dict[str, dict[str, Any]] = {}
    for part in iter_parts(open_folder(folder)):
        embeddings = part.embeddings
        for place, row in enumerate(part.rows.to_pylist()):
            key = row["id"] if row["num_chunks"] == 1 else f"{row['id']}#{row['chunk_index']}"
            if embeddings.dense_vecs is not None:
                row["dense"] = embeddings.dense_vecs[place].astype(np.float32)
            if (lexical := embeddings.lexical_weights) is not None:
                span = slice(lexical.indptr[place], lexical.indptr[place + 1])
                row["sparse"] = dict(zip(lexical.indices[span].tolist(), lexical.values[span].tolist(), strict=True))
            if (colbert := embeddings.colbert_vecs) is not None:
                span = slice(colbert.indptr[place], colbert.indptr[place + 1])
                vectors = colbert.vectors[span].astype(np.float32)
                row["colbert"] = vectors if colbert.scales is None else vectors * colbert.scales[span][:, None]
            rows.setdefault(key, row)
    return rows


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("colbert_dtype", ["float16", "int8"])
def test_parquet_has_every_row_and_number(
    tmp_path: Path,
    export: Callable[..., Completed],
    format: Any,  # noqa: A002
    colbert_dtype: Any,
) -> None:
    folder = write_folder(tmp_path / "corpus.m3", SHARDS, format=format, colbert_dtype=colbert_dtype)
    done = export(folder, "--to", "parquet", "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    rows = [row for index in range(3) for row in pq.read_table(tmp_path / f"out/part-{index:07d}.parquet").to_pylist()]
    expected = stored(folder)
    assert len(rows) == ROWS
    assert [row["key"] for row in rows] == list(expected)
    for row in rows:
        wanted = expected[row["key"]]
        for name in ("id", "chunk_index", "char_start", "char_end", "lang", "year", "tags", "text"):
            assert row[name] == wanted[name]
        assert np.array_equal(row["dense_vecs"], wanted["dense"])
        assert dict(zip(row["lexical_indices"], row["lexical_values"], strict=True)) == wanted["sparse"]
        matrix = np.array(row["colbert_vecs"], np.float32).reshape(-1, DIM)
        assert np.array_equal(matrix, wanted["colbert"].astype(np.float32))
    assert [(line["key"], line["field"]) for line in left_out(tmp_path / "out")] == [("a", None), ("b#1", None)]
    summary = json.loads((tmp_path / "out/export.json").read_bytes())
    assert (summary["rows"], summary["rows_left_out"]) == (ROWS, 2)
    assert "  row left out: an earlier row has this key: 2\n" in done.stderr


@pytest.mark.parametrize("outputs", ["dense,sparse,colbert", "sparse"])
@pytest.mark.parametrize("target", TARGETS)
def test_shards_of_which_no_row_is_left(
    tmp_path: Path, export: Callable[..., Completed], target: str, outputs: Any
) -> None:
    if target == "faiss" and outputs == "sparse":
        pytest.skip("faiss holds dense vectors only")
    unfit = Doc("long" * 20_000, "no key of an engine", weights=0)
    shards = [[Doc("a", "first")], [Doc("a", "again")], [unfit], [Doc("b", "second")], [Doc("b"), Doc("a")]]
    folder = write_folder(tmp_path / "c.m3", shards, outputs=tuple(outputs.split(",")))
    done = export(folder, "--to", target, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    summary = json.loads((tmp_path / "out/export.json").read_bytes())
    keys = {line["key"][:4] for line in left_out(tmp_path / "out") if line["field"] is None}
    assert keys - {"long"} == {"a", "b"}
    assert summary["rows"] == 2 + ("long" not in keys)
    assert summary["rows"] + summary["rows_left_out"] == 6


@pytest.mark.parametrize("target", [each for each in TARGETS if each != "parquet"])
def test_dates_that_python_cannot_represent_are_listed(
    tmp_path: Path, export: Callable[..., Completed], target: str
) -> None:
    day = pa.struct([("day", pa.list_(pa.date32()))])
    kept = pa.schema([("far", pa.timestamp("ms")), ("zone", pa.timestamp("s", "Mars/Base")), ("in", day)])
    near = {"far": 1 << 40, "zone": None, "in": {"day": [1, 2]}}
    far = {"far": 1 << 60, "zone": 1, "in": {"day": [1, 1 << 30]}}
    shards = [[Doc("a", "first", kept=near), Doc("b", "second", kept=far)]]
    folder = write_folder(tmp_path / "c.m3", shards, kept=kept)
    done = export(folder, "--to", target, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    lines = left_out(tmp_path / "out")
    assert [(line["key"], line["field"]) for line in lines] == [("b", "far"), ("b", "zone"), ("b", "in")]
    assert json.loads((tmp_path / "out/export.json").read_bytes())["rows"] == 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file())
    assert b"2004-11-03" in written or target == "milvus"  # whose Parquet is compressed


def test_npy_opens_with_numpy_and_scipy(tmp_path: Path, folder: Path, export: Callable[..., Completed]) -> None:
    from scipy.sparse import load_npz  # noqa: PLC0415

    assert export(folder, "--to", "npy", "--out", tmp_path / "out").returncode == 3
    expected = list(stored(folder).items())
    keys = [json.loads(line) for line in (tmp_path / "out/keys.jsonl").read_bytes().splitlines()]
    dense = np.load(tmp_path / "out/dense.npy", mmap_mode="r")
    sparse = load_npz(tmp_path / "out/sparse.npz")
    vectors, indptr = np.load(tmp_path / "out/colbert.npy"), np.load(tmp_path / "out/colbert.indptr.npy")
    assert [line["key"] for line in keys] == [key for key, _ in expected]
    assert dense.dtype == vectors.dtype == np.float16
    for place, (_, row) in enumerate(expected):
        assert np.array_equal(dense[place], row["dense"])
        found = sparse[place].tocoo()
        assert dict(zip(found.col.tolist(), found.data.tolist(), strict=True)) == row["sparse"]
        assert np.array_equal(vectors[indptr[place] : indptr[place + 1]], row["colbert"])


def test_faiss_reads_the_index(tmp_path: Path, folder: Path, export: Callable[..., Completed]) -> None:
    faiss = pytest.importorskip("faiss")
    assert export(folder, "--to", "faiss", "--out", tmp_path / "out").returncode == 3
    expected = list(stored(folder).items())
    index = faiss.read_index(str(tmp_path / "out/index.faiss"))
    assert (index.ntotal, index.d, index.metric_type) == (ROWS, DIM, faiss.METRIC_INNER_PRODUCT)
    assert np.array_equal(index.reconstruct_n(0, ROWS), np.array([row["dense"] for _, row in expected]))
    faiss.write_index(index, str(tmp_path / "again.faiss"))
    assert (tmp_path / "again.faiss").read_bytes() == (tmp_path / "out/index.faiss").read_bytes()


def read_lines(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of bulk files, by their id."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("part-*.ndjson")):
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        rows |= {action["index"]["_id"]: row for action, row in zip(lines[::2], lines[1::2], strict=True)}
    return rows


@pytest.mark.parametrize("target", ["elasticsearch", "opensearch"])
def test_bulk_files_have_every_row_and_number(
    tmp_path: Path, folder: Path, export: Callable[..., Completed], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3cli.exporters.elasticsearch.FILE_BYTES", 1000)
    assert export(folder, "--to", target, "--out", tmp_path / "out").returncode == 3
    files = list((tmp_path / "out").glob("part-0000000-*.ndjson"))
    assert len(files) > 1
    expected, found = stored(folder), read_lines(tmp_path / "out")
    properties = json.loads((tmp_path / "out/index.json").read_bytes())["mappings"]["properties"]
    assert list(found) == list(expected)
    for key, row in found.items():
        wanted = expected[key]
        assert set(row) <= set(properties)
        for name in ("id", "chunk_index", "char_start", "char_end", "lang", "year", "text"):
            assert row[name] == wanted[name]
        assert json.loads(row["tags"]) == wanted["tags"]
        dense = np.array(row["dense_vecs"], np.float32)
        assert np.abs(np.linalg.norm(dense) - 1) < 1e-6
        assert np.allclose(dense, wanted["dense"], atol=1e-3)
        assert ("colbert_vecs" in row) == (target == "elasticsearch")
        if "colbert_vecs" in row:
            assert np.array_equal(np.array(row["colbert_vecs"], np.float32), wanted["colbert"])
        weights = {int(token): np.float32(weight) for token, weight in row.get("lexical_weights", {}).items()}
        assert weights == {token: np.float32(weight) for token, weight in wanted["sparse"].items()}


def test_signs_go_to_elasticsearch_as_bits(tmp_path: Path, export: Callable[..., Completed]) -> None:
    folder = write_folder(tmp_path / "binary.m3", SHARDS, colbert_dtype="binary")
    assert export(folder, "--to", "elasticsearch", "--out", tmp_path / "out").returncode == 3
    properties = json.loads((tmp_path / "out/index.json").read_bytes())["mappings"]["properties"]
    assert properties["colbert_vecs"] == {"type": "rank_vectors", "dims": DIM, "element_type": "bit"}
    bits = [row["colbert_vecs"] for row in read_lines(tmp_path / "out").values()]
    signs = [
        part.embeddings.colbert_vecs.vectors[slice(*part.embeddings.colbert_vecs.indptr[row : row + 2])]
        for part in iter_parts(open_folder(folder))
        if part.embeddings.colbert_vecs is not None
        for row in range(part.rows.num_rows)
    ]
    assert np.array_equal(np.array(bits[0], np.int8).view(np.uint8), signs[0])
    assert export(folder, "--to", "vespa", "--out", tmp_path / "vespa").returncode == 3
    first = json.loads((tmp_path / "vespa/part-0000000.jsonl").read_bytes().splitlines()[0])["fields"]
    assert list(first["colbert_vecs"]["blocks"].values()) == [row.tobytes().hex() for row in signs[0]]
    assert f"tensor<int8>(t{{}},x[{DIM // 8}])" in (tmp_path / "vespa/binary.sd").read_text(encoding="utf-8")


def read_bfloat16(text: str) -> Any:
    return (np.frombuffer(bytes.fromhex(text), ">u2").astype(np.uint32) << 16).view(np.float32)


def test_vespa_operations_have_every_row_and_number(
    tmp_path: Path, folder: Path, export: Callable[..., Completed]
) -> None:
    assert export(folder, "--to", "vespa", "--out", tmp_path / "out", "--name", "m3").returncode == 3
    parts = sorted((tmp_path / "out").glob("part-*.jsonl"))
    operations = [json.loads(line) for path in parts for line in path.read_bytes().splitlines()]
    expected = stored(folder)
    assert [line["put"] for line in operations] == [f"id:m3:m3::{key}" for key in expected]
    for line, wanted in zip(operations, expected.values(), strict=True):
        fields = line["fields"]
        for name in ("id", "chunk_index", "char_start", "char_end", "lang", "year", "text"):
            assert fields[name] == wanted[name]
        assert np.allclose(read_bfloat16(fields["dense_vecs"]["values"]), wanted["dense"], rtol=2**-8)
        cells = fields.get("lexical_weights", {"cells": {}})["cells"]
        weights = {int(token): np.float32(weight) for token, weight in cells.items()}
        assert weights == {token: np.float32(weight) for token, weight in wanted["sparse"].items()}
        blocks = [read_bfloat16(block) for block in fields["colbert_vecs"]["blocks"].values()]
        assert np.allclose(np.array(blocks), wanted["colbert"], rtol=2**-8)


def test_a_long_id_and_a_number_that_json_lacks_are_listed(tmp_path: Path, export: Callable[..., Completed]) -> None:
    kept = pa.schema([("score", pa.float64())])
    docs = [Doc("x" * 513, "1", kept={"score": 1.0}), Doc("nan", "2", kept={"score": float("nan")})]
    folder = write_folder(tmp_path / "corpus.m3", [docs], kept=kept)
    assert export(folder, "--to", "opensearch", "--out", tmp_path / "out").returncode == 3
    assert read_lines(tmp_path / "out")["nan"]["score"] is None
    assert [(line["key"], line["field"], line["why"]) for line in left_out(tmp_path / "out")] == [
        ("x" * 513, None, "key over 512 bytes"),
        ("nan", "score", "not a finite number"),
    ]


def test_only_the_fields_asked_for_go_along(tmp_path: Path, folder: Path, export: Callable[..., Completed]) -> None:
    assert export(folder, "--to", "parquet", "--out", tmp_path / "out", "--fields", "lang").returncode == 3
    names = pq.read_schema(tmp_path / "out/part-0000000.parquet").names
    assert names[:6] == ["key", "id", "chunk_index", "char_start", "char_end", "lang"]
    assert "text" not in names


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_that_died_goes_on_to_the_same_bytes(tmp_path: Path, folder: Path, target: str) -> None:
    def export(out: Path) -> int:
        return run(["export", str(folder), "--to", target, "--out", str(out), "--progress", "none"])

    with crash_at(None, writes=True) as steps:
        assert export(tmp_path / "whole") == 3
    whole = export_bytes(tmp_path / "whole")
    for step in np.linspace(0, len(steps.log) - 1, 10).astype(int).tolist():
        out = tmp_path / f"out-{step}"
        with crash_at(step, writes=True):
            export(out)
        assert export(out) == 3
        assert export_bytes(out) == whole
        shutil.rmtree(out)


def export_bytes(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_bytes(out).items() if name != "_export/lock"}


def test_parts_that_are_there_are_kept(tmp_path: Path, folder: Path, export: Callable[..., Completed]) -> None:
    out = tmp_path / "out"
    export(folder, "--to", "parquet", "--out", out)
    before = export_bytes(out)
    kept = (out / "part-0000002.parquet").stat().st_ino
    (out / "part-0000000.parquet").unlink()
    (out / "export.json").unlink()
    assert export(folder, "--to", "parquet", "--out", out).returncode == 3
    assert export_bytes(out) == before
    assert (out / "part-0000002.parquet").stat().st_ino == kept


def test_what_cannot_be_exported_is_refused_in_one_line(
    tmp_path: Path, folder: Path, export: Callable[..., Completed]
) -> None:
    out = tmp_path / "out"
    assert export(folder, "--to", "parquet", "--out", out).returncode == 3
    unfinished = write_folder(tmp_path / "unfinished.m3", SHARDS, finish=False)
    binary = write_folder(tmp_path / "binary.m3", SHARDS, colbert_dtype="binary")
    damaged = write_folder(tmp_path / "damaged.m3", SHARDS)
    os.truncate(damaged / "rows/shard-0000002.parquet", 100)
    named = {name: pa.schema([(name, pa.string())]) for name in ("key", "two words")}
    clash, words = (write_folder(tmp_path / f"{name}.m3", [[Doc("a")]], kept=kept) for name, kept in named.items())
    other = write_folder(tmp_path / "other.m3", SHARDS[:1])
    cases = [
        ((folder, "--to", "oracle", "--out", out), 2, "oracle"),
        ((folder, "--to", "parquet", "--out", out, "--outputs", "dense"), 10, "dense"),
        ((folder, "--to", "npy", "--out", out), 10, "npy"),
        ((other, "--to", "parquet", "--out", out), 10, "another folder"),
        ((folder, "--to", "parquet", "--out", tmp_path), 10, "not an export"),
        ((folder, "--to", "parquet", "--out", tmp_path / "x", "--fields", "author"), 2, "author"),
        ((folder, "--to", "faiss", "--out", tmp_path / "x", "--outputs", "sparse"), 2, "sparse"),
        ((binary, "--to", "parquet", "--out", tmp_path / "x", "--outputs", "colbert"), 2, "bit"),
        ((clash, "--to", "pgvector", "--out", tmp_path / "x"), 2, "--fields"),
        ((words, "--to", "milvus", "--out", tmp_path / "x"), 2, "two words"),
        ((folder, "--to", "elasticsearch", "--out", tmp_path / "x", "--name", "Upper"), 2, "Upper"),
        ((unfinished, "--to", "parquet", "--out", tmp_path / "x"), 75, "not finished"),
        ((damaged, "--to", "parquet", "--out", tmp_path / "y"), 12, "m3 check"),
    ]
    for arguments, code, told in cases:
        done = export(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert told in done.stderr


def test_a_full_disk_is_told_before_the_first_byte(
    tmp_path: Path, folder: Path, export: Callable[..., Completed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m3cli.jobs.encode.estimate.find_free_bytes", lambda _: 100)
    done = export(folder, "--to", "parquet", "--out", tmp_path / "out")
    assert done.returncode == 6
    assert not list((tmp_path / "out").glob("part-*"))
    assert export(folder, "--to", "parquet", "--out", tmp_path / "out", "--no-space-check").returncode == 3


def test_sigterm_ends_with_75_and_the_same_command_goes_on(tmp_path: Path) -> None:
    shards = [[Doc(f"{shard}-{row}", f"{shard}-{row}", vectors=40) for row in range(200)] for shard in range(8)]
    folder = write_folder(tmp_path / "corpus.m3", shards)
    command = [sys.executable, "-m", "m3cli", "export", str(folder), "--to", "parquet", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "out/part-0000001.parquet").exists():
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 75), errors
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert json.loads((tmp_path / "out/export.json").read_bytes())["rows"] == 1600

"""Rows that only the model shows to be bad, by NaN or by its memory: their shard is done again without them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from m3cli.encoder import device as machine
from m3cli.encoder import encode as encoding
from m3cli.encoder.model import run_model as real_run_model
from m3cli.jobs.encode import pipeline
from m3cli.records import Batch
from tests.conftest import Completed
from tests.functional.test_bad_rows import read_ids, read_skipped

M3 = Callable[..., Completed]
POISON = "\u2603"
"a character of its own token"


def poison(model: Path, folder: Path, value: float) -> Path:
    """Copy a checkpoint and give one token's word embedding a value, up and down."""
    shutil.copytree(model, folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(POISON).ids
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    assert ids[-2] > 3
    weights[name][ids[-2]] = torch.tensor([value, -value]).repeat(weights[name].shape[1] // 2)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def broken_m3(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poison(tiny_m3, tmp_path_factory.mktemp("models") / "broken", float("nan"))


@pytest.fixture(scope="module")
def steep_m3(tiny_m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Too large for float16, not for float32."""
    return poison(tiny_m3, tmp_path_factory.mktemp("models") / "steep", 1e5)


def write_corpus(path: Path, poisoned: frozenset[int], *, left_out: frozenset[int] = frozenset()) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(60):
        text = " ".join(f"word{number * place}" for place in range(1 + number % 17))
        rows.append({"id": f"d{number}", "text": f"{text} {POISON}" if number in poisoned else text, "n": number})
    rows[7]["text"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["n"] not in left_out), encoding="utf-8")


FLAGS = ("--keep-fields", "n", "--max-batch-tokens", "200")
BAD = frozenset({3, 20, 21, 59})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_a_row_that_is_no_number_is_skipped_as_if_it_had_never_been_planned(
    m3_here: M3, tmp_path: Path, broken_m3: Path, dtype: str, kind: str
) -> None:
    write_corpus(tmp_path / "a.jsonl", BAD)
    write_corpus(tmp_path / "b.jsonl", frozenset(), left_out=BAD)
    for name in ("a", "b"):
        done = m3_here("encode", f"{name}.jsonl", "--model", broken_m3, "--dtype", dtype, "--format", kind, *FLAGS)
        assert done.returncode == 3, done.stderr
    files = [path.relative_to(tmp_path / "b.m3") for path in (tmp_path / "b.m3").rglob("shard-*.*")]
    data = [file for file in files if file.parts[:2] not in {("_m3", "done"), ("_m3", "skipped")}]
    assert len(data) == (2 if kind == "parquet" else 6)
    for file in data:
        assert (tmp_path / "a.m3" / file).read_bytes() == (tmp_path / "b.m3" / file).read_bytes(), file
    skipped = read_skipped(tmp_path / "a.m3")
    assert [row["id"] for row in skipped] == ["d3", "d7", "d20", "d21", "d59"]
    corpus = (tmp_path / "a.jsonl").read_bytes()
    for row in skipped:
        assert json.loads(corpus[row["byte_offset"] :].split(b"\n")[0])["id"] == row["id"]
    late = [row for row in skipped if row["id"] != "d7"]
    assert {row["reason"] for row in late} == {"not a number in the output"}
    assert late[0]["row"].endswith(POISON)
    assert ("and in float32" in late[0]["detail"]) == (dtype == "bfloat16")


def test_weights_that_memory_does_not_hold_are_one_line(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_weights(checkpoint: Any) -> Any:
        raise RuntimeError("unable to mmap 470585192 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    monkeypatch.setattr("m3cli.encoder.model._read_weights", read_weights)
    write_corpus(tmp_path / "c.jsonl", frozenset())
    # a folder that no other test has loaded: a model is kept by its folder
    shutil.copytree(tiny_m3, tmp_path / "large")
    done = m3_here("encode", "c.jsonl", "--model", "large", *FLAGS)
    assert done.returncode == 5
    assert "do not fit the memory of cpu in" in done.stderr.splitlines()[-1]


def test_a_shard_of_bad_rows_only_is_left_empty(m3_here: M3, tmp_path: Path, broken_m3: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", frozenset(range(30, 60)))
    done = m3_here("encode", "c.jsonl", "--model", broken_m3, "--shard-size", "200", *FLAGS)
    assert done.returncode == 3, done.stderr
    assert read_ids(tmp_path / "c.m3") == [f"d{number}" for number in range(30) if number != 7]
    tables = [pq.read_table(file) for file in sorted((tmp_path / "c.m3" / "rows").iterdir())]
    assert any(table.num_rows == 0 for table in tables)
    assert m3_here("encode", "c.jsonl").returncode == 3


def test_a_first_shard_without_numbers_is_exit_4(m3_here: M3, tmp_path: Path, broken_m3: Path) -> None:
    row = json.dumps({"id": "a", "text": POISON})
    (tmp_path / "c.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    done = m3_here("encode", "c.jsonl", "--model", broken_m3, "--dtype", "float32")
    assert done.returncode == 4
    assert "not a number in the output" in done.stderr.splitlines()[-1]
    assert "another checkpoint" in done.stderr.splitlines()[-1]


def test_a_row_too_large_for_float16_is_encoded_in_float32(m3_here: M3, tmp_path: Path, steep_m3: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", BAD)
    tables = {}
    for dtype in ("float16", "float32"):
        flags = ("--model", steep_m3, "--dtype", dtype, "--out", f"{dtype}.m3", *FLAGS)
        done = m3_here("encode", "c.jsonl", *flags)
        assert done.returncode == 3, done.stderr
        assert ("encoding it again in float32" in done.stderr) == (dtype == "float16")
        metrics = json.loads((tmp_path / f"{dtype}.m3" / "_m3" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["repeated"] == ({"float32": len(BAD)} if dtype == "float16" else {})
        assert (metrics["device"], metrics["torch"]) == ("cpu", torch.__version__)
        assert metrics["device_name"]
        tables[dtype] = pq.read_table(tmp_path / f"{dtype}.m3" / "rows")
    ids = tables["float16"].column("id").to_pylist()
    assert ids == [f"d{number}" for number in range(60) if number != 7]
    dense = [np.stack(table.column("dense_vecs").to_numpy()).astype(np.float32) for table in tables.values()]
    assert ((dense[0] * dense[1]).sum(axis=1) > 0.999).all()


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Let memory run out above so many tokens; the list grows by the tokens of each batch that is tried.

    Only a GPU's memory runs out so, and there batches go through the model one after the other.
    """

    def shrink(limit: int) -> list[int]:
        tried: list[int] = []

        def run_model(model: Any, batch: Batch) -> Any:
            tried.append(len(batch.input_ids))
            if len(batch.input_ids) > limit:
                raise torch.OutOfMemoryError("injected")
            return real_run_model(model, batch)

        monkeypatch.setattr(encoding, "run_model", run_model)
        monkeypatch.setattr(machine, "plan_threads", lambda threads, *, device: 1)
        return tried

    return shrink


def test_out_of_memory_halves_batches_for_the_rest_of_the_run(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, small_memory: Callable[[int], list[int]]
) -> None:
    write_corpus(tmp_path / "c.jsonl", frozenset())
    flags = ("--model", tiny_m3, "--dtype", "float32", "--shard-size", "1K", "--max-batch-tokens", "1000")
    assert m3_here("encode", "c.jsonl", "--out", "whole.m3", *flags).returncode == 3
    tried = small_memory(150)
    done = m3_here("encode", "c.jsonl", "--out", "small.m3", *flags)
    assert done.returncode == 3, done.stderr
    refused = [tokens for tokens in tried if tokens > 150]
    assert 1 <= len(refused) <= 3, "the limit is learned once"
    limit = int(re.findall(r"at most (\d+)", done.stderr)[-1])
    assert refused[-1] // 2 <= limit < refused[-1], "the larger half"
    assert max(tried[tried.index(refused[-1]) + 1 :]) <= 150
    whole, small = (pq.read_table(tmp_path / name / "rows") for name in ("whole.m3", "small.m3"))
    assert whole.column("id").equals(small.column("id"))
    dense = [np.stack(table.column("dense_vecs").to_numpy()).astype(np.float32) for table in (whole, small)]
    np.testing.assert_allclose(dense[0], dense[1], atol=1e-3)


def test_one_chunk_that_does_not_fit_is_skipped(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, small_memory: Callable[[int], list[int]]
) -> None:
    rows = [{"id": str(n), "text": "many words " * (200 if n == 5 else 1)} for n in range(10)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small_memory(100)
    done = m3_here("encode", "c.jsonl", "--model", tiny_m3, "--dtype", "float32")
    assert done.returncode == 3, done.stderr
    assert read_ids(tmp_path / "c.m3") == [str(n) for n in range(10) if n != 5]
    (skipped,) = read_skipped(tmp_path / "c.m3")
    assert skipped["reason"] == "out of memory"
    assert "--max-length" in skipped["detail"]


def test_a_first_shard_that_does_not_fit_at_all_is_exit_5(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, small_memory: Callable[[int], list[int]]
) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    small_memory(1)
    done = m3_here("encode", "c.jsonl", "--model", tiny_m3, "--dtype", "float32")
    assert done.returncode == 5
    assert "out of memory" in done.stderr.splitlines()[-1]


def test_another_error_of_the_device_is_not_taken_for_memory(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_model(model: Any, batch: Batch) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(encoding, "run_model", run_model)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    done = m3_here("encode", "c.jsonl", "--model", tiny_m3, "--dtype", "float32")
    assert done.returncode == 1
    assert "internal error: RuntimeError: CUDA error: an illegal memory access" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("flags", [(), ("--dedupe", "--format", "npy"), ("--long-docs", "merge"), ("--mcls", "8")])
def test_the_threads_of_a_gpu_write_the_same_bytes(
    m3_here: M3, tmp_path: Path, broken_m3: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several windows a shard, batches ahead, windows ordered ahead; rows that fail, so that shards come again."""
    monkeypatch.setitem(encoding.WINDOW_BYTES, "cpu", 128 * 64 * 2)
    monkeypatch.setattr(machine, "plan_threads", lambda *_, **__: 1)
    write_corpus(tmp_path / "c.jsonl", BAD)
    common = ("c.jsonl", "--model", broken_m3, "--dtype", "float32", "--shard-size", "1K", "--max-length", "24")
    usual = (*common, *FLAGS, *flags)
    assert m3_here("encode", *usual, "--out", "cpu.m3").returncode == 3
    monkeypatch.setitem(pipeline.WINDOWS_AHEAD, "cpu", 1)
    monkeypatch.setitem(machine.AHEAD, "cpu", 3)
    assert m3_here("encode", *usual, "--out", "gpu.m3").returncode == 3
    files = [path.relative_to(tmp_path / "cpu.m3") for path in (tmp_path / "cpu.m3").rglob("shard-*.*")]
    assert len(files) > 20
    for file in files:
        assert (tmp_path / "cpu.m3" / file).read_bytes() == (tmp_path / "gpu.m3" / file).read_bytes(), file


def test_a_query_that_cannot_be_encoded_is_counted_and_the_others_are_searched_for(
    m3_here: M3, tmp_path: Path, broken_m3: Path
) -> None:
    write_corpus(tmp_path / "a.jsonl", frozenset())
    assert m3_here("encode", "a.jsonl", "--model", broken_m3, "--dtype", "float32").returncode == 3
    queries = [{"id": "good", "text": "word8 word16"}, {"id": "bad", "text": f"word3 {POISON}"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")
    arguments = ("search", "a.m3", "--model", broken_m3, "--dtype", "float32", "-k", "1", "--queries")
    done = m3_here(*arguments, "q.jsonl")
    assert done.returncode == 3, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["good"]
    assert "1 of 2 queries cannot be encoded; the first, 'bad': " in done.stderr
    done = m3_here(*arguments, POISON)
    assert (done.returncode, done.stdout) == (5, "")
    assert "1 of 1 query cannot be encoded; the first, 'query': " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("head", "value", "fault"),
    [("sparse", float("nan"), "NaN or infinity"), ("colbert", 0.0, "a vector of length 0")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_gives_no_numbers_is_told(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, head: str, value: float, fault: str, dtype: str
) -> None:
    shutil.copytree(tiny_m3, tmp_path / "model")
    path = tmp_path / "model" / f"{head}_linear.pt"
    torch.save({name: torch.full_like(part, value) for name, part in torch.load(path).items()}, path)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    flags = ("--model", tmp_path / "model", "--dtype", dtype)
    done = m3_here("encode", "c.jsonl", *flags)
    assert done.returncode == 4
    tried = "bfloat16 and in float32" if dtype == "bfloat16" else "float32"
    assert f"not a number in the output ({fault} in {tried}); use another checkpoint" in done.stderr
    assert m3_here("encode", "c.jsonl", *flags, "--outputs", "dense", "--out", "dense.m3").returncode == 0

    (tmp_path / "pairs.tsv").write_text("query\tpassage\none\ttwo\n", encoding="utf-8")
    done = m3_here("score", "pairs.tsv", *flags)
    assert done.returncode == 3
    assert done.stdout.splitlines()[1] == "one\ttwo" + "\t" * 5
    assert "not a number in the output (row 1)" in done.stderr


@pytest.mark.parametrize("form", ["int8", "binary"])
def test_vectors_quantised_on_the_device_are_stored_as_those_of_the_host(
    m3_here: M3, tmp_path: Path, broken_m3: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "c.jsonl", BAD)
    usual = ("c.jsonl", "--model", broken_m3, "--dtype", "float32", "--colbert-dtype", form, *FLAGS)
    assert m3_here("encode", *usual, "--out", "host.m3").returncode == 3
    monkeypatch.setitem(pipeline.QUANTISES, "cpu", True)
    assert m3_here("encode", *usual, "--out", "device.m3").returncode == 3
    tables = [pq.read_table(tmp_path / name / "rows") for name in ("host.m3", "device.m3")]
    assert (
        tables[0]
        .drop_columns("colbert_scales" if form == "int8" else [])
        .equals(tables[1].drop_columns("colbert_scales" if form == "int8" else []))
    )
    if form == "int8":
        scales = [np.frombuffer(b"".join(table["colbert_scales"].to_pylist()), np.float32) for table in tables]
        np.testing.assert_allclose(scales[0], scales[1], rtol=1e-6)

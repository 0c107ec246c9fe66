"""`scripts/bench`: every bench runs on a small input and prints its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import contender
from benchmarks.contest import Group, Made
from benchmarks.peers import group_padded
from benchmarks.speed import Shape, count_flops
from tests.conftest import ROOT, build_sample


def bench(name: str, *arguments: object) -> str:
    paths = {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **paths}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("speed", ["--documents", 4, "--only", "m3 bfloat16", "--end-to-end"], "m3 encode dense,sparse, end to end"),
        ("lengths", ["--lengths", 16, "--tokens", 64], "m3 bfloat16"),
        ("shapes", ["--counts", 2, "--lengths", 8, "--threads", 1, "--seconds", 0, "--only", "m3 b"], "bfloat16, 2 x"),
        ("growth", ["--sizes", "20,30", "--repeat", 1], "30 rows"),
        ("growth", ["--documents", "--sizes", "0.01", "--rows", 10], "0.01 MB"),
        ("host", ["--rows", 50, "--repeat", 1, "--shards", 3], "nothing to do"),
        ("busy", ["--tokens", 2000, "--lengths", 20, "--ms", 0.1, "--batch", 300], "dense,sparse,colbert, 20"),
        ("score", ["--pairs", 8, "--queries", 2, "--reference-pairs", 4, "--batch-sizes", 4], "m3 bfloat16"),
    ],
)
def test_a_bench_of_a_model(name: str, arguments: list[object], shown: str, tiny_m3: Path, tmp_path: Path) -> None:
    json_path = tmp_path / "numbers.json"
    out = bench(name, "--model", tiny_m3, "--corpus", build_sample(), "--json", json_path, *arguments)
    assert shown in out
    assert {"date", "machine"} <= set(json.loads(json_path.read_text()))


def test_the_bench_of_search(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    small = ("--rows", 50, "--dims", 8, "--queries", 1, "--top-k", 5, "--rounds", 1)
    assert "8, npy" in bench("search", *small, "--work", tmp_path)


def test_the_bench_of_exports(tmp_path: Path) -> None:
    small = ("--rows", 30, "--dim", 8, "--weights", 3, "--targets", "npy", "elasticsearch")
    assert "elasticsearch, 30" in bench("export", *small, "--work", tmp_path / "work")


def test_the_bench_of_the_writer(tmp_path: Path) -> None:
    assert "parquet zstd" in bench("writer", tmp_path, "--mib", 1, "--rounds", 1)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["correct,probe", "speed,peers,colbert"])
def test_the_bench_of_a_gpu_runs_on_a_cpu(parts: str, tiny_m3: Path, tmp_path: Path) -> None:
    """As on a GPU machine: no pip and no network, checkpoints made from a tokenizer alone."""
    sizes = ("--layers", 2, "--hidden", 64, "--documents", 100, "--batch", 256, "--seconds", 0.001)
    files = ("--tokenizer", tiny_m3, "--corpus", build_sample(), "--json", tmp_path / "out.json")
    bench("gpu", *files, *sizes, "--parts", parts, "--device", "cpu", "--work", tmp_path / "work")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    if "correct" in parts:
        # A CUDA build of torch without a GPU skips the tests on fake tensors too.
        all_skipped = torch.version.cuda is not None and not torch.cuda.is_available()
        assert ("skipped" if all_skipped else "passed") in found["correct"]["tests"]
        assert "failed" not in found["correct"]["tests"]
        assert found["correct"]["differing_files"] == []
        assert min(each["least_cosine"] for each in found["correct"]["parity"].values()) > 0.999
        kernels = found["probe"]
        assert min(kernels[name]["ms"] for name in ("qkv: linear", "forward 30", "forward 256")) > 0
        assert kernels["forward 30"]["least_cosine"] > 0.999
    else:
        assert found["speed"]["dense + sparse, shards of 8M"]["tokens_per_second"] > 0
        assert found["peers"]["rows"]["m3 float32"]["model_tokens_per_second"] > 0
        assert found["colbert"]["search, colbert"]["hits_shared"] == 1.0


def test_on_a_gpu_two_full_batches_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run(group: Group) -> Made:
        ran.append(group.tokens)
        return Made(positions=group.tokens)

    monkeypatch.setattr(contender, "read_peak", lambda _: 0)
    group = Group(texts=["text"] * 2000, lengths=[250] * 2000)
    contender.time_group(run, group, device="cuda")
    contender.time_group(run, group, device="cpu")
    assert ran[0] >= 2 * 65536
    assert ran[1:] == [500_000, 2000, 500_000]


def test_flops_are_those_of_the_matmuls() -> None:
    length = 5
    matmuls = [
        *[(length, 8, 8)] * 4,  # query, key, value, output
        (length, 8, 32),
        (length, 32, 8),
        (length, 8, length),  # scores over all heads
        (length, length, 8),  # sums of values
    ]
    one = 3 * sum(2 * rows * inner * columns for rows, inner, columns in matmuls)
    assert count_flops(Shape(layers=3, width=8, inner=32), [length, length]) == 2 * one


def test_padded_groups_hold_each_row_once_within_the_budget() -> None:
    lengths = [3, 300, 17, 40, 41, 5]
    groups = group_padded(lengths, budget=120)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[row] for row in group) <= 120 for group in groups)


@pytest.mark.parametrize("script", ["bench", "quality"])
def test_an_unknown_name_lists_what_there_is(script: str) -> None:
    done = subprocess.run([ROOT / "scripts" / script, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"scripts/{script} " in done.stderr

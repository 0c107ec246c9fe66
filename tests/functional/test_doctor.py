"""`m3 doctor` as a command; what it measures is only looked at for being there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.errors import ModelError
from m3cli.jobs import doctor
from m3cli.jobs.doctor import Figure, is_bge_m3, recompute_card
from tests.conftest import Completed


@pytest.mark.slow
def test_report_as_json(m3: Callable[..., Completed], tiny_m3: Path, tmp_path: Path) -> None:
    done = m3("doctor", "--model", tiny_m3, "--device", "cpu", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    machine, checkpoint, advice = report["machine"], report["checkpoint"], report["recommendation"]
    assert machine["devices"][0]["memory_bytes"] > 0
    assert min(machine["matmul_flops_per_second"].values()) > 0
    assert machine["disk_bytes_per_second"] > 0
    assert (checkpoint["layers"], checkpoint["width"], checkpoint["vocabulary"]) == (2, 64, 250002)
    assert checkpoint["files"]["model.safetensors"] == "safetensors"
    assert advice["tokens_per_second"] > 0
    statuses = {figure["name"]: figure["status"] for figure in report["card"]}
    assert statuses["token ids of 'What is BGE M3?'"] == "pass"
    assert statuses["colbert of pair 4"] == "not this model"
    assert [path.name for path in tmp_path.iterdir()] == [], "the file that was written to measure the disk is gone"


@pytest.mark.slow
def test_report_to_read_and_no_model(m3: Callable[..., Completed], tiny_m3: Path) -> None:
    done = m3("doctor", "--model", tiny_m3)
    assert done.returncode == 0
    for words in ("matmul", "GFLOP/s", "max length", "recommendation", "tokens/s", "model card: 3 of 3 pass"):
        assert words in done.stdout
    bare = m3("doctor", HF_HOME="/nonexistent", cwd=Path("/proc"))  # where not even root can write
    assert bare.returncode == 0
    assert "matmul" in bare.stdout
    assert "64 MiB cannot be written to /proc" in bare.stdout
    assert m3("doctor", "--model", "nowhere").returncode == 5


def test_no_download_of_the_default_model_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def open_none(*_: object, **settings: object) -> None:
        asked.append(settings)
        raise ModelError("none")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "open_checkpoint", open_none)
    monkeypatch.setattr(doctor, "examine_machine", lambda device: {})
    assert doctor.examine(device="cpu")["problem"] == "none"
    with pytest.raises(ModelError):
        doctor.examine(model="org/model", device="cpu")
    assert asked == [{"download": False}, {"download": True}]
    assert "HF_HUB_OFFLINE" not in os.environ


def test_every_published_figure_is_computed(tiny_m3: Path) -> None:
    figures = recompute_card(read_checkpoint(tiny_m3), device="cpu")
    assert len(figures) == 3 + 4 + 13 + 2 + 2 + 20
    assert len({figure.name for figure in figures}) == len(figures)
    assert all(figure.found is not None for figure in figures)
    assert [figure.status for figure in figures[:3]] == ["pass"] * 3


def test_figures_are_judged_for_bge_m3_only(tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_checkpoint(tiny_m3)
    shape = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "vocab_size": 250002, "num_positions": 8194}
    assert not is_bge_m3(checkpoint)
    assert not is_bge_m3(replace(checkpoint, name="bge-m3"))
    assert is_bge_m3(replace(checkpoint, name="BAAI/bge-m3", **shape))  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "is_bge_m3", lambda _: True)
    judged: list[Figure] = recompute_card(checkpoint, device="cpu")
    assert {figure.status for figure in judged} == {"pass", "fail"}
    assert judged[3].status == "fail", "a random model has not the published similarity"


def test_a_checkpoint_without_heads_has_no_such_figures(tiny_m3: Path, tmp_path: Path) -> None:
    for path in tiny_m3.iterdir():
        if path.name not in ("sparse_linear.pt", "colbert_linear.pt"):
            (tmp_path / path.name).symlink_to(path)
    found = {figure.name: figure.found for figure in recompute_card(read_checkpoint(tmp_path), device="cpu")}
    assert found["colbert of pair 1"] is None
    assert found["dense of pair 1"] is not None

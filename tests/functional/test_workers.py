"""Workers that share a folder, or have one each: they leave what one run leaves, and their metrics add up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3cli.store import documents
from tests.conftest import Completed
from tests.crash import folder_bytes
from tests.functional.corpora import SETTINGS, write_corpus

M3 = Callable[..., Completed]


@pytest.fixture
def words(tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    write_corpus(tmp_path / "corpus.jsonl")
    return ("encode", "corpus.jsonl", "--model", tiny_m3, *SETTINGS, "--outputs", "dense,sparse")


def read_metrics(path: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(path.read_bytes())
    return metrics


def test_folders_of_workers_without_a_common_disk_are_copied_into_one(
    m3_here: M3, tmp_path: Path, words: tuple[object, ...]
) -> None:
    assert m3_here(*words, "--out", "plain.m3").returncode == 3
    for worker in range(3):
        done = m3_here(*words, "--out", f"{worker}.m3", "--worker", f"{worker}/3")
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / f"{worker}.m3/_m3/manifest.json").exists()
        shutil.copytree(tmp_path / f"{worker}.m3", tmp_path / "all.m3", dirs_exist_ok=True)
    assert m3_here("check", "all.m3").returncode == 75  # no manifest yet
    assert m3_here(*words, "--out", "all.m3").returncode == 3
    assert folder_bytes(tmp_path / "all.m3") == folder_bytes(tmp_path / "plain.m3")
    assert m3_here("check", "all.m3").returncode == 3


def test_a_worker_that_died_is_replaced_by_others_and_what_ended_adds_up(
    m3_here: M3, tmp_path: Path, words: tuple[object, ...]
) -> None:
    assert m3_here(*words, "--out", "plain.m3").returncode == 3
    assert m3_here(*words, "--out", "o.m3", "--worker", "1/3").returncode == 0
    # As SIGKILL leaves it: half a shard, no metrics.
    left = tmp_path / "o.m3/_m3/tmp/1-of-3"
    left.mkdir()
    (left / "rows--shard-0000004.parquet").write_bytes(b"half")
    (tmp_path / "o.m3/_m3/metrics.1-of-3.json").unlink()
    for entry in sorted((tmp_path / "o.m3/_m3/done").iterdir())[1:]:
        entry.unlink()
    for worker in range(2):
        assert m3_here(*words, "--out", "o.m3", "--worker", f"{worker}/2").returncode in (0, 3)
    assert folder_bytes(tmp_path / "o.m3") == folder_bytes(tmp_path / "plain.m3")
    assert list((tmp_path / "o.m3/_m3/tmp").iterdir()) == []
    parts = [read_metrics(tmp_path / f"o.m3/_m3/metrics.{worker}-of-2.json") for worker in range(2)]
    whole = read_metrics(tmp_path / "o.m3/_m3/metrics.json")
    for name in ("documents", "tokens", "skipped", "tokens_per_second"):
        assert whole[name] == pytest.approx(sum(part[name] for part in parts))
    assert whole["seconds"]["encoding"] == pytest.approx(sum(part["seconds"]["encoding"] for part in parts))
    assert whole["peak_memory_bytes"] == max(part["peak_memory_bytes"] for part in parts)
    found = json.loads(m3_here("info", "o.m3", "--json").stdout)
    assert found["metrics"] == whole
    assert found["metrics"]["runs"] == 2
    assert f"{whole['tokens_per_second']:,.0f} tokens/s in 2 runs" in m3_here("info", "o.m3").stdout
    assert m3_here("check", "o.m3").returncode == 3


def test_only_the_last_worker_reads_the_entries(
    m3_here: M3, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = documents.read_entry

    def read_entry(path: Path) -> Any:
        read.append(path)
        return real(path)

    monkeypatch.setattr(documents, "read_entry", read_entry)
    for worker in range(4):
        read.clear()
        m3_here(*words, "--out", "o.m3", "--worker", f"{worker}/4")
        done = len(list(Path("o.m3/_m3/done").iterdir()))
        # At the start, what was done before; at the end nothing, until all is done.
        assert len(read) <= (3 * done if worker == 3 else done * worker // (worker + 1) + 1)


def test_a_machine_with_fewer_threads_than_the_folder_says_so(
    m3_here: M3, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = "m3cli.encoder.device.auto_threads"
    monkeypatch.setattr(machine, lambda: 2)
    assert "float32 on cpu (2 threads)" in m3_here(*words, "--out", "o.m3", "--worker", "0/2").stderr
    monkeypatch.setattr(machine, lambda: 1)
    said = m3_here(*words, "--out", "o.m3", "--worker", "1/2").stderr
    assert said.count("o.m3 was begun with 2 threads, which decide its bytes; this machine has 1: slower") == 1


def test_metrics_that_are_not_readable_are_left_out(m3_here: M3, tmp_path: Path, words: tuple[object, ...]) -> None:
    assert m3_here(*words, "--out", "o.m3").returncode == 3
    (tmp_path / "o.m3/_m3/metrics.0-of-9.json").write_bytes(b"{")
    assert json.loads(m3_here("info", "o.m3", "--json").stdout)["metrics"]["runs"] == 1

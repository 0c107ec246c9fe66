from __future__ import annotations

from pathlib import Path

import pytest

from m3cli.errors import CorpusError, FolderLocked
from m3cli.jobs.encode.lifecycle import MetricsFile, keep_metrics


def test_labels_are_escaped_and_numbers_stay_exact() -> None:
    metrics = MetricsFile(None, out='a\\b"c\nd')
    metrics.numbers.update(documents=123456789012, tokens_per_second=1.23456)
    lines = metrics.render().split("\n")
    assert r'm3_documents{out="a\\b\"c\nd"} 123456789012' in lines
    assert r'm3_tokens_per_second{out="a\\b\"c\nd"} 1.235' in lines
    assert lines[-1] == ""


def test_the_exit_code_of_an_error_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m3.prom"
    with pytest.raises(CorpusError), keep_metrics(str(path), out="o"):
        raise CorpusError("gone")
    assert 'm3_exit_code{out="o"} 4\n' in path.read_text(encoding="utf-8")
    with pytest.raises(ZeroDivisionError), keep_metrics(str(path), out="o"):
        raise ZeroDivisionError
    assert 'm3_exit_code{out="o"} 1\n' in path.read_text(encoding="utf-8")


def test_the_file_of_the_run_that_holds_the_folder_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m3.prom"
    path.write_text("its numbers", encoding="utf-8")
    with pytest.raises(FolderLocked), keep_metrics(str(path), out="o"):
        raise FolderLocked("by pid 1")
    assert path.read_text(encoding="utf-8") == "its numbers"


def test_without_a_path_nothing_is_written_or_due() -> None:
    with keep_metrics(None, out="o") as metrics:
        assert not metrics.due
        metrics.numbers["exit_code"] = 0

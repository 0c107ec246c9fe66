"""What the system does not let us look at is refused in one line, by the package that was asked for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from m3cli.corpus.sources import find_sources
from m3cli.corpus.trec import read_run
from m3cli.encoder.checkpoint import find_checkpoint
from m3cli.errors import CorpusError, M3Error, ModelError, OutputError, check_reachable
from m3cli.store.reader import open_folder

LONG = "x" * 300


def test_what_is_not_there_is_no_fault(tmp_path: Path) -> None:
    check_reachable(tmp_path, CorpusError)
    check_reachable(tmp_path / "nothing", CorpusError)
    (tmp_path / "file").touch()
    check_reachable(tmp_path / "file" / "below", CorpusError)


def test_what_may_not_be_looked_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: object, **_: object) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(CorpusError, match=r"a\.jsonl cannot be read: Permission denied; check its name and who may"):
        check_reachable(tmp_path / "a.jsonl", CorpusError)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda: find_sources((LONG,)), CorpusError),
        (lambda: read_run(LONG), CorpusError),
        (lambda: open_folder(Path(LONG)), OutputError),
        (lambda: find_checkpoint(f"./{LONG}"), ModelError),
    ],
)
def test_every_package_reports_a_name_that_cannot_be(ask: Callable[[], object], error: type[M3Error]) -> None:
    with pytest.raises(error, match="cannot be read: File name too long; check its name"):
        ask()

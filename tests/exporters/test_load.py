"""`m3 load` with an engine that this test plays: what is sent again, what ends it, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from m3cli.cli.app import run
from m3cli.cli.terminal import stop
from m3cli.exporters import rows as exported
from m3cli.exporters.rows import LeftOut, Part, Target
from m3cli.jobs import load as job
from tests.conftest import Completed
from tests.exporters.folders import Doc, write_folder

SECRET = "s3cret"
ADDRESS = f"https://user:{SECRET}@host/db"


class Passing(Exception):
    """An error that passes."""


class Lasting(Exception):
    """An error that does not."""


class FakeEngine:
    """Rows by key, and the errors that the next calls end with."""

    batch_bytes, number_bytes, weight_bytes = 2000, 4.0, 8.0

    def __init__(self) -> None:
        self.rows: dict[str, Any] | None = None
        self.errors: list[Exception] = []
        self.batches: list[int] = []
        self.uncounted = 0

    def list_clients(self, _address: str) -> dict[str, str]:
        return {}

    def find_limits(self, _address: str) -> Target:
        return Target(outputs=("dense", "sparse"))

    def connect(self, address: str, _shape: Any) -> FakeEngine:
        assert address == ADDRESS
        return self

    def explain(self, error: Exception) -> tuple[bool, str] | None:
        known = isinstance(error, Passing | Lasting)
        return (isinstance(error, Passing), f"cannot\nlog in at {ADDRESS}: {error}") if known else None

    def create(self) -> bool:
        created, self.rows = self.rows is None, self.rows or {}
        return created

    def make_batch(self, part: Part, lost: LeftOut) -> list[str]:
        return part.keys.to_pylist()  # type: ignore[no-any-return]

    def upsert(self, batch: list[str]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        assert self.rows is not None
        self.batches.append(len(batch))
        self.rows |= dict.fromkeys(batch)

    def delete(self, keys: Sequence[str]) -> None:
        assert self.rows is not None
        for key in keys:
            self.rows.pop(key, None)

    def finish(self) -> None:
        pass

    def count(self) -> int:
        assert self.rows is not None
        return len(self.rows) - self.uncounted

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    played = FakeEngine()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exported, "ENGINES", ("fake",))
    monkeypatch.setattr(exported, "import_module", {"m3cli.exporters.fake": played}.__getitem__)
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=lambda _: None))
    return played


@pytest.fixture
def load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Completed]:
    def load(folder: Path, *options: object) -> Completed:
        capfd.readouterr()
        code = run(["load", str(folder), "--to", f"fake:{ADDRESS}", *map(str, options)])
        shown = capfd.readouterr()
        assert SECRET not in shown.out + shown.err
        return Completed([], code, shown.out, shown.err)

    return load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "corpus.m3", [[Doc(str(row), str(row)) for row in range(40)]])


def test_an_error_that_passes_is_tried_again(folder: Path, engine: FakeEngine, load: Callable[..., Completed]) -> None:
    engine.errors = [Passing()] * 6
    assert load(folder).returncode == 0
    assert engine.rows is not None
    assert len(engine.rows) == 40
    assert len(engine.batches) > 1


@pytest.mark.parametrize("errors", [[Passing("again")] * 7, [Lasting("for good")]], ids=["seven times", "lasting"])
def test_any_other_error_ends_with_the_words_of_the_engine(
    folder: Path, engine: FakeEngine, load: Callable[..., Completed], errors: list[Exception]
) -> None:
    engine.errors = list(errors)
    done = load(folder)
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    assert str(errors[-1]) in done.stderr
    assert "fake:https://user:***@host/db" in done.stderr
    assert not engine.errors


def test_a_count_that_does_not_match_is_told(folder: Path, engine: FakeEngine, load: Callable[..., Completed]) -> None:
    engine.uncounted = 1
    done = load(folder)
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "39 rows, expected 40" in done.stderr


def test_a_load_that_is_stopped_ends_with_75(
    folder: Path, engine: FakeEngine, load: Callable[..., Completed], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reason", "at_once"):
        monkeypatch.setattr(stop, name, getattr(stop, name))  # put back afterwards

    def swallow(_batch: list[str]) -> None:
        stop.reason, stop.at_once = "stopped by SIGTERM", True
        raise Lasting("a client that passes on any error in its own words")

    monkeypatch.setattr(engine, "upsert", swallow)
    assert load(folder).returncode == 75


def test_what_is_left_out_is_listed_and_only_then(
    tmp_path: Path, folder: Path, engine: FakeEngine, load: Callable[..., Completed]
) -> None:
    assert load(folder).returncode == 0
    assert not (tmp_path / "corpus.left-out.jsonl").exists()
    twice = write_folder(tmp_path / "twice.m3", [[Doc("a", "1"), Doc("a", "2")]])
    assert load(twice).returncode == 3
    assert json.loads((tmp_path / "twice.left-out.jsonl").read_bytes())["key"] == "a"


def test_since_sends_changes_and_deletes_what_is_gone(
    tmp_path: Path, folder: Path, engine: FakeEngine, load: Callable[..., Completed]
) -> None:
    docs = [Doc(str(row), str(row)) for row in range(40)]
    docs[7] = Doc("7", "another text")
    docs[9] = Doc("9", "9", kept={"lang": "fr"})
    new = write_folder(tmp_path / "new.m3", [docs[3:20], docs[20:], [Doc("40", "40", chunks=2)]])
    assert load(folder).returncode == 0
    engine.batches.clear()
    done = load(new, "--since", folder)
    assert done.returncode == 0
    assert sum(engine.batches) == 4
    assert "4 rows written, 35 unchanged, 3 deleted" in done.stderr
    assert engine.rows is not None
    assert engine.rows.keys() == {*map(str, range(3, 40)), "40#0", "40#1"}


def test_since_tells_what_a_load_that_died_did_not_send(
    tmp_path: Path, folder: Path, engine: FakeEngine, load: Callable[..., Completed]
) -> None:
    new = write_folder(tmp_path / "new.m3", [[Doc(str(row), str(row)) for row in range(41)]])
    engine.errors = [Lasting()]
    assert load(folder).returncode == 6
    done = load(new, "--since", folder)  # nothing was sent
    assert "41 rows written, 0 unchanged, 0 deleted" in done.stderr
    assert engine.rows is not None
    for name in ("3", "7"):
        del engine.rows[name]
    done = load(folder, "--since", new)
    assert done.returncode == 0
    assert (
        f"corpus had 2 rows fewer than {new}: unless so many were left out, load again without --since" in done.stderr
    )
    assert "fewer than" not in load(new).stderr


def test_since_compares_rows_with_dates_that_python_cannot_represent(
    tmp_path: Path, engine: FakeEngine, load: Callable[..., Completed]
) -> None:
    kept = pa.schema([("when", pa.timestamp("ms"))])
    docs = [[Doc("a", "one", kept={"when": 1 << 60}), Doc("b", "two", kept={"when": 7})]]
    old = write_folder(tmp_path / "old.m3", docs, kept=kept)
    assert load(old).returncode == 0
    docs[0][1] = Doc("b", "two", kept={"when": 8})
    done = load(write_folder(tmp_path / "new.m3", docs, kept=kept), "--since", old)
    assert "1 row written, 1 unchanged, 0 deleted" in done.stderr


@pytest.mark.parametrize(
    ("to", "client"), [("milvus:x.db", "pymilvus"), ("pgvector:x", "psycopg"), ("qdrant:http://x", "qdrant-client")]
)
def test_a_client_that_is_missing_is_named(
    folder: Path, capfd: pytest.CaptureFixture[str], to: str, client: str
) -> None:
    if find_spec(client.replace("-", "_")):
        pytest.skip(f"{client} is installed")
    assert run(["load", str(folder), "--to", to]) == 2
    assert f"pip install '{client}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:a/b:c@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("host=x user=me password='two words' dbname=y", "host=x user=me password=*** dbname=y"),
        ("http://host:6333?api_key=abc&x=1", "http://host:6333?api_key=***&x=1"),
        ("http://host:19530", "http://host:19530"),
        ("/some/folder/lite.db", "/some/folder/lite.db"),
    ],
)
def test_an_address_is_shown_without_its_secrets(address: str, shown: str) -> None:
    assert job.hide_secrets(address) == shown


@pytest.mark.parametrize("to", ["oracle:x", "milvus", "milvus:"])
def test_an_unknown_engine_is_refused(folder: Path, capfd: pytest.CaptureFixture[str], to: str) -> None:
    assert run(["load", str(folder), "--to", to]) == 2
    assert "milvus:ADDRESS" in capfd.readouterr().err

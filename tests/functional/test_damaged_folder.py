"""Folders whose documents or files are not what was written: every command says so in one line, none breaks or hangs.

A sample of all cases is tried; `M3_ALL_DAMAGE=1` tries every one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from m3cli.store.documents import dumps_with_checksum
from tests.conftest import Completed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a flipped bit of a vector may make it infinite

M3 = Callable[..., Completed]
VALUES: tuple[object, ...] = (None, "x", -1, 1e99, [], {}, True)
MISSING = object()
DOCUMENTS = ("run.json", "done/shard-0000000.json", "manifest.json")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(path.stat().st_size)),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}
DOCUMENTED = {0, 2, 3, 5, 6, 10, 12, 75}
SECONDS = 120
NUM_CASES = 1 << 30 if os.environ.get("M3_ALL_DAMAGE") else 30


def flip(raw: bytes) -> bytes:
    place = len(raw) // 3
    return raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :] if raw else b"x"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def list_members(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """List the paths of all members, containers and leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from list_members(item, (*path, name))


def change(document: Any, path: tuple[Any, ...], value: object) -> bool:
    """Put a value in the place of a member; False if it is there already."""
    for name in path[:-1]:
        document = document[name]
    if value is MISSING:
        del document[path[-1]]
        return True
    same = type(document[path[-1]]) is type(value) and document[path[-1]] == value
    document[path[-1]] = value
    return not same


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_m3: Path) -> Callable[[M3, str], Path]:
    """A complete folder by format, made once, with some shards and a row that was skipped."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("whole")

    def make(m3_here: M3, form: str) -> Path:
        if form not in made:
            rows = [{"id": str(n), "text": f"text {n} of some words", "lang": "en"} for n in range(12)]
            lines = [json.dumps(row) for row in rows]
            (root / "a.jsonl").write_text("\n".join([*lines[:3], "no JSON", *lines[3:]]) + "\n")
            flags = ("--shard-size", 256, "--max-length", 16, "--format", form, "--keep-fields", "lang")
            done = m3_here("encode", root / "a.jsonl", "--out", root / form, "--model", tiny_m3, *flags)
            assert done.returncode == 3, done.stderr
            found = m3_here("search", root / form, "-q", "some words", "--model", tiny_m3)
            assert found.returncode == 0, found.stderr
            made[form] = root / form
        return made[form]

    return make


def try_all(m3_here: M3, folder: Path, model: Path, source: Path) -> dict[str, Completed]:
    """Try each command that reads a folder on a copy that none of them has written to."""
    found = {}
    for command, arguments in {
        "info": ("info", "X.m3"),
        "check": ("check", "X.m3"),
        "search": ("search", "X.m3", "-q", "some words", "--model", model, "--progress", "none"),
        "plan": ("plan", source, "--out", "X.m3", "--model", model),
        "encode": ("encode", source, "--out", "X.m3", "--model", model, "--progress", "none"),
    }.items():
        shutil.rmtree("X.m3", ignore_errors=True)
        shutil.copytree(folder, "X.m3", symlinks=True)
        with time_limit(SECONDS):
            found[command] = m3_here(*arguments)
        assert found[command].returncode in DOCUMENTED, (command, found[command].stderr)
        if found[command].returncode not in (0, 3, 75) and command != "check":
            assert found[command].stderr.count("\n") == 1, (command, found[command].stderr)
    return found


def test_documents_with_any_member_replaced(
    m3_here: M3, whole: Callable[[M3, str], Path], tmp_path: Path, tiny_m3: Path
) -> None:
    folder = whole(m3_here, "parquet")
    cases: list[tuple[str, bool, tuple[str | int, ...], object]] = []
    for name in DOCUMENTS:
        document = orjson.loads((folder / "_m3" / name).read_bytes())
        del document["checksum"]
        cases += [
            (name, finished, path, value)
            for path in list_members(document)
            for value in (*VALUES, MISSING)
            for finished in (True, False)
            if finished or name != "manifest.json"
        ]
    random.Random(0).shuffle(cases)
    for name, finished, path, value in cases[:NUM_CASES]:
        shutil.rmtree("Y.m3", ignore_errors=True)
        shutil.copytree(folder, "Y.m3")
        target = tmp_path / "Y.m3/_m3" / name
        document = orjson.loads(target.read_bytes())
        del document["checksum"]
        if not change(document, path, value):
            continue
        target.write_bytes(dumps_with_checksum(document))
        if not finished:
            (tmp_path / "Y.m3/_m3/manifest.json").unlink()
            (tmp_path / "Y.m3/_m3/done/shard-0000001.json").unlink()
        try:
            found = try_all(m3_here, tmp_path / "Y.m3", tiny_m3, folder.parent / "a.jsonl")
        except BaseException as error:
            raise AssertionError((name, finished, path, "missing" if value is MISSING else value)) from error
        if finished:
            codes = found["check"].returncode, found["encode"].returncode
            assert codes[0] in (10, 12), (name, path, value, found["check"].stdout)


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_files_damaged_in_any_way(
    m3_here: M3, whole: Callable[[M3, str], Path], tmp_path: Path, tiny_m3: Path, form: str
) -> None:
    folder = whole(m3_here, form)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    cases = [(name, damage) for name in names for damage in DAMAGES]
    random.Random(0).shuffle(cases)
    for name, damage in cases[: NUM_CASES // 2]:
        shutil.rmtree("Y.m3", ignore_errors=True)
        shutil.copytree(folder, "Y.m3")
        DAMAGES[damage](tmp_path / "Y.m3" / name)
        try:
            found = try_all(m3_here, tmp_path / "Y.m3", tiny_m3, folder.parent / "a.jsonl")
        except BaseException as error:
            raise AssertionError((name, damage)) from error
        if name.startswith("_m3/lock") or name == "_m3/metrics.json":
            continue
        if (name, damage) != ("_m3/manifest.json", "removed"):
            assert found["check"].returncode == 12, (name, damage, found["check"].stdout)
        healed = damage == "removed" and name.startswith(("_m3/manifest", "_m3/done"))  # encode does the shard again
        if damage in ("removed", "empty", "truncated"):
            assert found["encode"].returncode == (3 if healed else 6), (name, damage, found["encode"].stderr)

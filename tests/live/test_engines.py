"""`m3 load` into engines that run here: the same rankings, every row, kills, increments, and rows that few can hold."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import ROOT
from tests.exporters.folders import Doc, write_folder
from tests.live import engines
from tests.live.conftest import m3

pytestmark = pytest.mark.live

NEAR = 2e-4
"scores that differ by less may change places"
HYBRID = ("--weights", "1,1,0", "--candidates", 2520)
SEARCHES = {
    "dense": ("dense", ()),
    "sparse": ("sparse", ()),
    "colbert": ("colbert", ()),
    "weighted": ("hybrid", HYBRID),
    "rrf": ("hybrid", (*HYBRID, "--fusion", "rrf")),
}


def load(engine: Any, folder: Path, *options: object, codes: tuple[int, ...] = (0,)) -> list[dict[str, Any]]:
    """Load a folder; return what was left out."""
    listed = folder.with_suffix(".jsonl")
    listed.unlink(missing_ok=True)
    m3("load", folder, "--to", engine.to, "--name", engines.NAME, "--left-out", listed, *options, codes=codes)
    return [json.loads(line) for line in listed.read_bytes().splitlines()] if listed.exists() else []


def check_rows(engine: Any, folder: Path, left_out: list[dict[str, Any]] = []) -> None:  # noqa: B006  not changed
    """Hold every row of an engine against the folder's; what is not equal must be in the list."""
    expected, found = engines.read_rows(folder), engine.rows()
    gone = {line["key"] for line in left_out if line["field"] is None}
    changed = {(line["key"], line["field"]) for line in left_out if line["field"] is not None}
    assert set(expected) - set(found) <= gone
    assert set(found) <= set(expected)
    for key, row in found.items():
        wanted = expected[key]
        for name in ("id", "chunk_index", "char_start", "char_end", "lang", "year", "text"):
            if name in wanted and (key, name) not in changed:
                assert row[name] == wanted[name], (key[:20], name)
        for output in engine.outputs:
            name = {"dense": "dense_vecs", "sparse": "lexical_weights", "colbert": "colbert_vecs"}[output]
            if (key, name) in changed:
                continue
            if output == "sparse":
                assert row[name].keys() == wanted[name].keys(), key[:20]
                assert np.allclose(list(row[name].values()), list(wanted[name].values()), rtol=1e-6)
            else:
                assert np.allclose(np.array(row[name]).reshape(wanted[name].shape), wanted[name], atol=1e-6), key[:20]


def test_rankings_are_those_of_m3_search(
    engine: Any, sample: Path, queries: Path, ranking: Callable[..., list[dict[str, float]]]
) -> None:
    load(engine, sample)
    check_rows(engine, sample)
    load(engine, sample)
    assert len(engine.rows()) == len(engines.read_rows(sample))
    asked = list(engines.read_rows(queries).values())
    for search, (mode, options) in SEARCHES.items():
        if search in engine.searches:
            lists = [ranking("dense"), ranking("sparse")] if search == "rrf" else []
            compare(engine.rank(search, asked), ranking(mode, *options), search, lists)


def compare(
    found: list[list[tuple[str, float]]],
    expected: list[dict[str, float]],
    search: str,
    lists: Sequence[list[dict[str, float]]] = (),
) -> None:
    """Hold rankings against those of m3; in fused ones, rows of equal scores in all `lists` may change places too."""
    assert len(found) == len(expected) == 50
    for query, (hits, scores) in enumerate(zip(found, expected, strict=True)):
        best = list(scores.items())[:10]
        assert len(hits) >= len(best)
        for (key, _), (wanted, score) in zip(hits, best, strict=False):
            apart = [abs(each[query].get(key, 0.0) - each[query].get(wanted, 0.0)) for each in lists]
            tied = bool(apart) and max(apart) < 1e-6
            assert key == wanted or tied or abs(scores[key] - score) < NEAR, (search, key, wanted)


def hostile() -> list[Doc]:
    ids = ['"quote"', "new\nline", "tab\t", "hash#1", "a/b/../c", "100%", "n\0ul", "emoji 😀", "x" * 600, "y" * 70_000]
    return [
        *(Doc(name, f"text {place}") for place, name in enumerate(ids)),
        Doc("null in text", "a\0b"),
        Doc("long text", "é" * 5_000_000),
        Doc("empty sparse", "1", weights=0),
        Doc("many vectors", "2", vectors=1_100),
        Doc("1,200 weights", "3", weights=1_200),
        Doc("17,000 weights", "4", weights=17_000),
        Doc("twice", "5"),
        Doc("twice", "6"),
        Doc("no vectors", "7", vectors=0),
        Doc("chunks", "8 and more", chunks=3),
        Doc("no fields", "9", kept={}),
    ]


def test_every_hostile_row_is_equal_or_listed(engine: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hostile.m3", [hostile()[:8], hostile()[8:]], dim=1024)
    left_out = load(engine, folder, codes=(3,))
    assert {"key": "twice", "field": None, "done": "row left out", "why": "an earlier row has this key"} in left_out
    check_rows(engine, folder, left_out)


def test_kept_fields_are_loaded_by_their_names(engine: Any, tmp_path: Path) -> None:
    names = ["order", "user", "Größe"][: 2 if "milvus" in engine.to else 3]  # words of SQL, and no plain ones
    for number, some in enumerate((names, names[::-1])):
        kept = pa.schema([(name, pa.string()) for name in some])
        docs = [Doc(f"{number}-{row}", kept={name: f"{name} {row}" for name in names}) for row in range(3)]
        load(engine, write_folder(tmp_path / f"{number}.m3", [docs], kept=kept))
    rows = engine.rows()
    assert len(rows) == 6
    for key, row in rows.items():
        assert {name: row[name] for name in names} == {name: f"{name} {key[-1]}" for name in names}


def test_a_load_that_was_killed_is_done_by_the_same_command(engine: Any, tmp_path: Path) -> None:
    shards = [[Doc(f"{shard}-{row}", f"{shard}-{row}", vectors=40) for row in range(150)] for shard in range(8)]
    folder = write_folder(tmp_path / "corpus.m3", shards)
    command = [sys.executable, "-m", "m3cli", "load", str(folder), "--to", engine.to, "--name", engines.NAME]
    began = time.monotonic()
    load(engine, folder)
    seconds = time.monotonic() - began
    for share in (0.5, 0.7, 0.9):
        engine.clear()
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(seconds * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
        load(engine, folder)
        check_rows(engine, folder)


def test_two_loads_at_once_make_one_collection(engine: Any, tmp_path: Path) -> None:
    if "lite" in engine.to:
        pytest.skip("Milvus Lite is one process's")
    folders = [
        write_folder(tmp_path / f"{part}.m3", [[Doc(f"{part}-{row}", f"{row}") for row in range(20)]]) for part in "ab"
    ]
    command = [sys.executable, "-m", "m3cli", "load", "--to", engine.to, "--name", engines.NAME]
    load(engine, folders[0])
    for _ in range(3):
        engine.clear()
        both = [
            subprocess.Popen([*command, str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for folder in folders
        ]
        said = [process.communicate()[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert len(engine.rows()) == 40


def test_three_nights_since_equal_a_fresh_load(engine: Any, tmp_path: Path) -> None:
    docs = {name: Doc(name, f"text of {name}") for name in "abcdefgh"}
    nights = [
        dict(docs),
        {**docs, "b": Doc("b", "another text"), "i": Doc("i", "new"), "c": Doc("c", "text of c", kept={"lang": "fr"})},
        {name: doc for name, doc in docs.items() if name not in "ah"} | {"d": Doc("d", "text of d", chunks=2)},
        {**docs, "d": Doc("d", "text of d", chunks=3), "e": Doc("e", "text of f")},
    ]
    folders = []
    for night, content in enumerate(nights):
        rows = list(content.values())
        folders.append(write_folder(tmp_path / f"night{night}.m3", [rows[: 3 + night], rows[3 + night :]]))
        since = ("--since", folders[night - 1]) if night else ()
        load(engine, folders[-1], *since)
        check_rows(engine, folders[-1])
        assert len(engine.rows()) == len(engines.read_rows(folders[-1]))


def test_the_example_searches_what_was_loaded(engine: Any, tmp_path: Path) -> None:
    docs = [Doc(f"d{row}", f"text {row}", vectors=3) for row in range(30)]
    load(engine, write_folder(tmp_path / "corpus.m3", [docs]))
    queries = write_folder(tmp_path / "queries.m3", [[Doc("q", "text 7", vectors=3)]])
    name, _, address = engine.to.partition(":")
    example = ROOT / "scripts" / "examples" / f"search_{name}.py"
    done = subprocess.run(
        [sys.executable, example, address, engines.NAME, queries], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[1].rstrip(":") for line in lines} >= {"dense", "sparse", "rrf"}
    assert {line[2] for line in lines} == {"d7"}, done.stdout


def test_another_schema_is_refused_by_its_field(engine: Any, tmp_path: Path) -> None:
    load(engine, write_folder(tmp_path / "corpus.m3", [[Doc("a")]]))
    other = write_folder(tmp_path / "other.m3", [[Doc("a")]], dim=32)
    done = m3("load", other, "--to", engine.to, "--name", engines.NAME, codes=(10,))
    assert done.stderr.count("\n") == 1
    assert "dense_vecs" in done.stderr
    done = m3("load", other, "--to", engine.to, "--name", engines.NAME, "--fields", "lang", codes=(10,))
    assert done.stderr.count("\n") == 1

"""An increment encodes what is new, takes the rest over from an older folder, and tells what is gone."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.encoder import encode as encoding
from m3cli.encoder.encode import WINDOW_BYTES
from m3cli.encoder.model import run_model as real_run_model
from m3cli.records import Batch
from m3cli.store.reader import OutputFolder, ShardArrays, open_folder, read_shard
from tests.conftest import Completed

M3 = Callable[..., Completed]
FLAGS = ("--dtype", "float32", "--max-length", "24", "--shard-size", "4K")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that goes through the model."""
    batches: list[int] = []

    def run_model(model: Any, batch: Batch) -> Any:
        batches.append(len(batch.rows))
        return real_run_model(model, batch)

    monkeypatch.setattr(encoding, "run_model", run_model)
    return batches


def make_rows(count: int) -> list[dict[str, Any]]:
    words = random.Random(0)
    return [
        {"id": f"d{n}", "text": " ".join(f"word{words.randrange(1000)}" for _ in range(1 + n % 23)), "n": n}
        for n in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_all(path: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """The rows of a folder: what each has in columns, and its vectors."""
    folder: OutputFolder = open_folder(path)
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for index in folder.entries:
        part: ShardArrays = read_shard(folder, index)
        dense, lexical, colbert = (
            part.embeddings.dense_vecs,
            part.embeddings.lexical_weights,
            part.embeddings.colbert_vecs,
        )
        assert dense is not None
        assert lexical is not None
        assert colbert is not None
        for place, row in enumerate(part.rows.to_pylist()):
            weights = slice(lexical.indptr[place], lexical.indptr[place + 1])
            vectors = colbert.vectors[colbert.indptr[place] : colbert.indptr[place + 1]]
            row.pop("n", None)
            found[row["id"], row["chunk_index"]] = (
                row,
                dense[place].astype(np.float32),
                dict(zip(lexical.indices[weights].tolist(), lexical.values[weights].tolist(), strict=True)),
                vectors.astype(np.float32),
            )
    return found


def assert_equal(path: Path, other: Path) -> None:
    ours, theirs = read_all(path), read_all(other)
    assert list(ours) == list(theirs)
    for key, (row, dense, weights, vectors) in ours.items():
        assert row == theirs[key][0]
        np.testing.assert_allclose(dense, theirs[key][1], atol=2e-3)
        np.testing.assert_allclose(vectors, theirs[key][3], atol=2e-3)
        assert weights == pytest.approx(theirs[key][2], abs=1e-3)


@pytest.mark.parametrize("old_format", ["parquet", "npy"])
@pytest.mark.parametrize("new_format", ["parquet", "npy"])
def test_only_new_texts_are_encoded(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int], old_format: str, new_format: str
) -> None:
    old = make_rows(300)
    write(tmp_path / "old.jsonl", [*old, {"id": "bad", "text": None}])
    model = ("--model", tiny_m3)
    done = m3_here("encode", "old.jsonl", *model, *FLAGS, "--format", old_format)
    assert done.returncode == 3, done.stderr
    new = [{**row, "id": f"new {row['id']}"} if row["n"] == 7 else row for row in old if row["n"] not in {11, 12}]
    new[100] = {**new[100], "text": "this text has changed"}
    new.insert(50, {"id": "added", "text": "words that were not there before " * 10, "n": -1})
    random.Random(1).shuffle(new[200:])
    write(tmp_path / "new.jsonl", new)
    flags = ("--keep-fields", "n", "--format", new_format, "--since-run", "old.m3", "--gone", "gone.jsonl")
    encoded.clear()
    done = m3_here("encode", "new.jsonl", *model, *FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    assert sum(encoded) == 1 + len([key for key in read_all(tmp_path / "new.m3") if key[0] == "added"])
    assert "297 documents; 3 ids of the older folder not in this one" in done.stderr
    gone = [json.loads(line)["id"] for line in (tmp_path / "gone.jsonl").read_text(encoding="utf-8").splitlines()]
    assert gone == ["d7", "d11", "d12"]
    done = m3_here("encode", "new.jsonl", *model, *FLAGS, "--keep-fields", "n", "--out", "whole.m3")
    assert done.returncode == 0
    assert_equal(tmp_path / "new.m3", tmp_path / "whole.m3")
    (tmp_path / "gone.jsonl").unlink()
    assert m3_here("encode", "new.jsonl", *flags).returncode == 0
    assert (tmp_path / "gone.jsonl").exists()
    assert m3_here("check", "new.m3").returncode == 0


def test_other_fields_shards_and_limits_do_not_matter_and_an_increment_follows_an_increment(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int]
) -> None:
    rows = make_rows(100)
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", [{"key": row["id"], "body": row["text"]} for row in rows])
    model = ("--model", tiny_m3, "--dtype", "float32", "--max-length", "24")
    assert m3_here("encode", "a.jsonl", *model, "--shard-size", "1K", "--limit", "90").returncode == 0
    encoded.clear()
    flags = ("--id-field", "key", "--text-field", "body", "--keep-text", "--since-run", "a.m3")
    assert m3_here("encode", "b.jsonl", *model, *flags).returncode == 0
    assert sum(encoded) == len([key for key in read_all(tmp_path / "b.m3") if int(key[0][1:]) >= 90])
    encoded.clear()
    done = m3_here("encode", "a.jsonl", *model, "--out", "c.m3", "--since-run", "b.m3", "--outputs", "dense,colbert")
    assert done.returncode == 0, done.stderr
    assert encoded == []


def test_an_older_folder_of_other_vectors_is_refused(m3_here: M3, tmp_path: Path, tiny_m3: Path) -> None:
    write(tmp_path / "a.jsonl", make_rows(10))
    model = ("--model", tiny_m3, "--dtype", "float32")
    assert m3_here("encode", "a.jsonl", *model, "--max-length", "24", "--outputs", "dense").returncode == 0
    for flags, said in (
        (("--max-length", "25"), "--max-length 24, this run has 25"),
        (("--max-length", "24", "--prefix", "query: "), "--prefix"),
        (("--outputs", "dense,sparse"), "no sparse output"),
    ):
        done = m3_here("encode", "a.jsonl", *model, *flags, "--out", "b.m3", "--since-run", "./a.m3")
        assert done.returncode == 10
        assert said in done.stderr
        assert "--since-run ./a.m3 " in done.stderr, "as it was typed"
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "b.m3").exists()
    assert m3_here("encode", "a.jsonl", *model, "--out", "b.m3", "--since-run", "none.m3").returncode == 2


def test_how_an_output_was_stored_that_is_not_wanted_does_not_matter(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int]
) -> None:
    write(tmp_path / "a.jsonl", make_rows(30))
    model = ("--model", tiny_m3, "--dtype", "float32", "--max-length", "24")
    stored = ("--colbert-dtype", "int8", "--colbert-pool", "2", "--dense-dtype", "float32")
    assert m3_here("encode", "a.jsonl", *model, *stored).returncode == 0
    encoded.clear()
    for outputs in ("sparse", "dense,sparse"):
        kept = ("--dense-dtype", "float32") if "dense" in outputs else ()
        words = ("--outputs", outputs, *kept, "--since-run", "a.m3", "--out", f"{outputs}.m3")
        done = m3_here("encode", "a.jsonl", *model, *words)
        assert done.returncode == 0, done.stderr
    assert encoded == []
    other = ("--outputs", "dense", "--dense-dtype", "float16")
    refused = m3_here("encode", "a.jsonl", *model, *other, "--since-run", "a.m3", "--out", "x.m3")
    assert refused.returncode == 10
    assert "--dense-dtype float32" in refused.stderr


def test_a_stopped_increment_goes_on_with_the_same_older_folder_only(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(200)
    write(tmp_path / "old.jsonl", rows)
    write(tmp_path / "new.jsonl", [*rows, *({"id": f"e{n}", "text": f"extra text {n}"} for n in range(200))])
    model = ("--model", tiny_m3)
    assert m3_here("encode", "old.jsonl", *model, *FLAGS).returncode == 0
    assert m3_here("encode", "new.jsonl", *model, *FLAGS, "--out", "whole.m3", "--since-run", "old.m3").returncode == 0

    def run_model(model: Any, batch: Batch) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "run_model", run_model)
        assert m3_here("encode", "new.jsonl", *model, *FLAGS, "--since-run", "old.m3").returncode == 130
    assert (tmp_path / "new.m3/_m3/done").exists()
    assert m3_here("encode", "new.jsonl", *model, "--since-run", "whole.m3").returncode == 10
    (tmp_path / "old.m3").rename(tmp_path / "moved.m3")
    assert m3_here("encode", "new.jsonl", *model).returncode == 2
    assert m3_here("encode", "new.jsonl", *model, "--since-run", "moved.m3").returncode == 0
    for file in (tmp_path / "whole.m3" / "rows").iterdir():
        assert file.read_bytes() == (tmp_path / "new.m3" / "rows" / file.name).read_bytes()
    done = m3_here("encode", "old.jsonl", "--out", "moved.m3", "--since-run", "whole.m3")
    assert done.returncode == 10
    assert "begun without --since-run" in done.stderr


@pytest.mark.parametrize("window", [1 << 30, 300_000])
def test_equal_texts_are_encoded_once(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setitem(WINDOW_BYTES, "cpu", window)
    rows = make_rows(20)
    many = [{**rows[n % 20], "id": f"x{n}"} for n in range(200)]
    write(tmp_path / "c.jsonl", many)
    flags = ("--model", tiny_m3, "--dtype", "float32", "--max-length", "24")
    assert m3_here("encode", "c.jsonl", *flags, "--out", "all.m3").returncode == 0
    total = sum(encoded)
    encoded.clear()
    assert m3_here("encode", "c.jsonl", *flags, "--dedupe").returncode == 0
    if window > 300_000:
        assert sum(encoded) == total // 10
    else:
        assert sum(encoded) < total
    assert_equal(tmp_path / "c.m3", tmp_path / "all.m3")
    assert m3_here("encode", "c.jsonl", "--dedupe").returncode == 0
    assert m3_here("encode", "c.jsonl", "--dedupe", "--out", "all.m3").returncode == 10


def list_inodes(path: Path) -> dict[str, int]:
    """The inode of each data file of a folder, by name."""
    names = ("rows", "dense_vecs", "lexical_weights", "colbert_vecs", "_m3/hashes", "_m3/skipped")
    files = [file for name in names for file in (path / name).glob("*")]
    return {str(file.relative_to(path)): file.stat().st_ino for file in files}


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_shards_that_did_not_change_are_linked_and_the_older_folder_may_go(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int], form: str
) -> None:
    rows: list[Any] = [*make_rows(1000), {"id": "bad", "text": None}]
    random.Random(0).shuffle(rows)
    write(tmp_path / "a.jsonl", rows)
    flags = ("--model", tiny_m3, *FLAGS, "--format", form, "--keep-fields", "n", "--dense-dtype", "float32")
    assert m3_here("encode", "a.jsonl", *flags, "--out", "old.m3").returncode == 3
    write(tmp_path / "a.jsonl", [*rows, *({**row, "id": f"new {row['id']}"} for row in make_rows(10))])
    encoded.clear()
    done = m3_here("encode", "a.jsonl", "--since-run", "old.m3", "--out", "new.m3")
    assert done.returncode == 3, done.stderr
    assert encoded == []
    old, new = list_inodes(tmp_path / "old.m3"), list_inodes(tmp_path / "new.m3")
    linked = [name for name in new if new[name] == old.get(name)]
    assert len(linked) > 0.9 * len(old)
    metrics = json.loads((tmp_path / "new.m3/_m3/metrics.json").read_bytes())
    whole = sum(file.stat().st_size for file in (tmp_path / "new.m3").rglob("*") if file.is_file())
    assert metrics["bytes_written"] < 0.03 * whole
    assert "1,010 documents" in done.stderr.split("taken over")[1].splitlines()[0]
    shutil.rmtree(tmp_path / "old.m3")
    assert m3_here("check", "new.m3").returncode == 3
    assert m3_here("encode", "a.jsonl", *flags, "--out", "whole.m3").returncode == 3
    for name in linked:
        assert (tmp_path / "new.m3" / name).read_bytes() == (tmp_path / "whole.m3" / name).read_bytes()
    assert_equal(tmp_path / "new.m3", tmp_path / "whole.m3")


def test_shards_are_copied_row_by_row_where_they_cannot_be_linked(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", make_rows(60))
    table = pa.Table.from_pylist(make_rows(60))
    wide = table.set_column(2, "n", table["n"].cast(pa.string()).cast(pa.large_string()))
    pq.write_table(wide, tmp_path / "wide.parquet")
    common = ("encode", "a.jsonl", "--model", tiny_m3, *FLAGS)
    assert m3_here(*common, "--keep-fields", "n", "--out", "old.m3").returncode == 0
    assert m3_here(*common, "--keep-fields", "n", "--out", "kept.m3").returncode == 0
    encoded.clear()
    assert m3_here(*common, "--keep-text", "--since-run", "old.m3", "--out", "other columns.m3").returncode == 0

    def refuse(link: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "hardlink_to", refuse)
        assert m3_here("encode", "a.jsonl", "--since-run", "old.m3", "--out", "other disk.m3").returncode == 0
    assert encoded == []
    assert_equal(tmp_path / "other disk.m3", tmp_path / "kept.m3")
    # A second source makes the kept field a string of another type.
    kept = ("--model", tiny_m3, *FLAGS, "--keep-fields", "n")
    assert m3_here("encode", "wide.parquet", *kept, "--out", "wide.m3").returncode == 0
    grown = ("wide.parquet", "a.jsonl", "--since-run", "wide.m3", "--out", "other types.m3")
    assert m3_here("encode", *grown).returncode == 0
    for old, new in (("old", "other columns"), ("old", "other disk"), ("wide", "other types")):
        assert m3_here("check", f"{new}.m3").returncode == 0
        inodes = [set(list_inodes(tmp_path / f"{name}.m3").values()) for name in (old, new)]
        assert not inodes[0] & inodes[1]


def test_the_message_about_changed_input_is_a_command_that_takes_over_the_rest(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, encoded: list[int]
) -> None:
    rows = make_rows(50)
    write(tmp_path / "a.jsonl", [{"words": row["text"], "text": "not this", "id": row["id"]} for row in rows])
    flags = ("--text-field", "words", "--keep-text", "--outputs", "dense", "--prefix", "passage: ")
    assert m3_here("encode", "a.jsonl", "--model", tiny_m3, *FLAGS, *flags).returncode == 0
    write(tmp_path / "a.jsonl", [{"words": row["text"], "text": "not this", "id": row["id"]} for row in make_rows(51)])
    refused = m3_here("encode", "a.jsonl", "--model", tiny_m3)
    assert refused.returncode == 10
    command = refused.stderr.split("take over the rest: ")[1].split()
    assert command == ["m3", "encode", "a.jsonl", "--out", "NEW.m3", "--since-run", "a.m3"]
    encoded.clear()
    for _ in range(2):  # the folder remembers the checkpoint, too
        done = m3_here(*command[1:])
        assert done.returncode == 0, done.stderr
        (tmp_path / "NEW.m3/_m3/manifest.json").unlink()
        for entry in (tmp_path / "NEW.m3/_m3/done").iterdir():
            entry.unlink()
    assert sum(encoded) == 2
    config = json.loads((tmp_path / "NEW.m3/_m3/run.json").read_bytes())["config"]
    assert (config["fields"]["text"], config["outputs"], config["prefix"]) == ("words", ["dense"], "passage: ")
    assert config["keep_text"]
    assert (config["max_length"], config["shard_size"]) == (24, 4096)


@pytest.mark.slow
def test_an_increment_that_is_killed_leaves_the_older_folder_as_it_was(tmp_path: Path, tiny_m3: Path) -> None:
    rows = make_rows(2000)
    write(tmp_path / "a.jsonl", rows)
    words = [sys.executable, "-m", "m3cli", "encode", "a.jsonl", "--progress", "none"]
    flags = ["--model", str(tiny_m3), "--dtype", "float32", "--shard-size", "2K", "--outputs", "dense,sparse"]
    subprocess.run([*words, *flags, "--out", "old.m3"], cwd=tmp_path, check=True)
    write(tmp_path / "a.jsonl", [*rows, *({**row, "id": f"new {row['id']}"} for row in make_rows(20))])
    before = {path: path.read_bytes() for path in sorted((tmp_path / "old.m3").rglob("*")) if path.is_file()}
    command, draw = [*words, "--since-run", "old.m3", "--out", "new.m3"], random.Random(0)
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(1.5, 3.5))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        if process.wait() == 0:
            shutil.rmtree(tmp_path / "new.m3")
    assert kills > 2
    subprocess.run(command, cwd=tmp_path, check=True)
    after = {path: path.read_bytes() for path in sorted((tmp_path / "old.m3").rglob("*")) if path.is_file()}
    assert after == before
    subprocess.run([*words[:4], *flags, "--progress", "none", "--out", "whole.m3", "a.jsonl"], cwd=tmp_path, check=True)
    assert subprocess.run([*words[:3], "check", "new.m3"], cwd=tmp_path, check=False).returncode == 0
    names = [path.name for path in (tmp_path / "whole.m3/rows").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new.m3/rows").iterdir())
    for name in sorted(names)[:-2]:
        assert (tmp_path / "new.m3/rows" / name).read_bytes() == (tmp_path / "whole.m3/rows" / name).read_bytes()


@pytest.mark.parametrize("form", ["parquet", "npy"])
@pytest.mark.parametrize("damage", ["rows", "vectors", "hashes", "truncated hashes"])
def test_nothing_is_reused_from_a_damaged_folder(
    m3_here: M3, tmp_path: Path, tiny_m3: Path, damage: str, form: str
) -> None:
    """Files of the right length whose bytes changed are found by their hash, before a row of theirs is reused."""
    write(tmp_path / "a.jsonl", make_rows(30))
    command = ("encode", "a.jsonl", "--model", tiny_m3, "--format", form, *FLAGS, "--progress", "none")
    assert m3_here(*command, "--out", "old.m3").returncode == 0
    folder = {"rows": "rows", "vectors": "rows" if form == "parquet" else "dense_vecs"}.get(damage, "_m3/hashes")
    path = min((tmp_path / "old.m3" / folder).iterdir())
    raw = path.read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    path.write_bytes(raw[:middle] if damage.startswith("truncated") else flipped)
    done = m3_here(*command, "--out", "new.m3", "--since-run", "old.m3")
    assert done.returncode == 12, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"{path} has" in done.stderr
    assert f"'m3 check {tmp_path / 'old.m3'}' lists all damage" in done.stderr
    assert not (tmp_path / "new.m3/_m3/manifest.json").exists()

"""Open and create folders; read run.json, done entries and the manifest."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from m3cli.errors import ForeignFolder, OutputError
from m3cli.records import DoneEntry, FileRecord, Shard, ShardCounts
from m3cli.store.commit import publish_json
from m3cli.store.documents import dumps_with_checksum, entry_document, read_json
from m3cli.store.folder import open_run_folder
from m3cli.store.layout import done_name, rows_name
from tests.crash import folder_bytes
from tests.store import samples

ENTRY = DoneEntry(
    shard=Shard(index=0, source=0, start=0, stop=10),
    source="corpus.jsonl",
    input_hash="0" * 32,
    counts=ShardCounts(documents=2, chunks=3, tokens=40, skipped=1, truncated=1, missing_ids=2),
    files=(FileRecord(name=rows_name(0), length=7, xxh3_128="1" * 32),),
)


def number_entry(index: int) -> DoneEntry:
    files = (replace(ENTRY.files[0], name=rows_name(index)),)
    return replace(ENTRY, shard=replace(ENTRY.shard, index=index), files=files)


def write_entry(root: Path, index: int) -> Path:
    path = root / done_name(index)
    for name in (path, root / rows_name(index)):
        name.parent.mkdir(exist_ok=True)
    (root / rows_name(index)).write_bytes(b"7 bytes")
    publish_json(entry_document(number_entry(index)), path, staging=root)
    return path


@pytest.mark.parametrize("existing", [[], ["_m3"], ["_m3", "_m3/lock", "rows"]])
def test_new_empty_and_incomplete_folders_are_opened(tmp_path: Path, existing: list[str]) -> None:
    root = tmp_path / "out"
    root.mkdir()
    for name in existing:
        if name.endswith("lock"):
            (root / name).touch()
        else:
            (root / name).mkdir()
    with open_run_folder(root) as folder:
        assert folder.run() is None
        assert folder.done() == {}
        assert folder.manifest() is None


def test_foreign_folder_is_an_error_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ForeignFolder, match="not an m3 folder: choose another --out"), open_run_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["thesis.txt"]  # noqa: PTH208


def test_file_instead_of_a_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"), open_run_folder(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="Not a directory"), open_run_folder(tmp_path / "out" / "below"):
        pass


def test_run_json_is_read_back(tmp_path: Path) -> None:
    document = samples.make_run(prefix="é\n")
    with open_run_folder(tmp_path / "out") as folder:
        folder.write_run(document)
        assert folder.run() == document
    with open_run_folder(tmp_path / "out") as folder:
        assert folder.run() == document
    on_disk = orjson.loads((tmp_path / "out/_m3/run.json").read_bytes())
    assert list(on_disk) == [
        *("format_version", "m3cli_version", "fingerprint", "config", "checkpoint", "sources", "since_path", "runtime"),
        "checksum",
    ]


def test_done_entries_are_read_back(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        for index in (2, 0):
            write_entry(tmp_path / "out", index)
        assert list(folder.done()) == [0, 2]
        assert folder.done()[0] == ENTRY


def test_manifest_only_when_every_shard_is_done(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        folder.write_run(samples.make_run())
        write_entry(tmp_path / "out", 0)
        write_entry(tmp_path / "out", 2)
        assert not folder.write_manifest(3)
        assert folder.manifest() is None
        write_entry(tmp_path / "out", 1)
        assert folder.write_manifest(3)
        manifest = folder.manifest()
    assert manifest is not None
    assert manifest.num_shards == len(manifest.done) == 3
    assert manifest.length == 21
    counts = ShardCounts(documents=6, chunks=9, tokens=120, skipped=3, truncated=3, missing_ids=6)
    assert manifest.counts == counts


def test_more_done_shards_than_the_input_has_is_an_error(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        folder.write_run(samples.make_run())
        for index in range(3):
            write_entry(tmp_path / "out", index)
        with pytest.raises(ForeignFolder, match="out has 3 shards, the input now has 2: it is shorter than it was"):
            folder.write_manifest(2)
        assert folder.manifest() is None
        assert list(folder.done()) == [0, 1, 2]
        assert folder.write_manifest(3)


def test_folder_without_a_shard_is_complete(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        folder.write_run(samples.make_run())
        assert folder.write_manifest(0)
    assert list(folder_bytes(tmp_path / "out")) == ["_m3/manifest.json", "_m3/run.json"]


@pytest.mark.parametrize("position", [0, 40, -3])
def test_damaged_entry_is_an_output_error_that_names_check(tmp_path: Path, position: int) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        path = write_entry(tmp_path / "out", 0)
        raw = bytearray(path.read_bytes())
        raw[position] ^= 1
        path.write_bytes(raw)
        with pytest.raises(OutputError, match=r"shard-0000000\.json does not match its checksum; 'm3 check "):
            folder.done()


def test_entry_of_another_shard_is_an_error(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        write_entry(tmp_path / "out", 0).rename(tmp_path / "out" / done_name(1))
        with pytest.raises(OutputError, match=r"shard-0000001\.json is the entry of shard 0"):
            folder.done()


def test_damaged_run_and_manifest_are_output_errors(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with open_run_folder(root) as folder:
        folder.write_run(samples.make_run())
        folder.write_manifest(0)
        folder.write_run(samples.make_run(prefix="other"))
        with pytest.raises(OutputError, match=r"run\.json is not the one"):
            folder.manifest()
        (root / "_m3/run.json").write_bytes(b"")
        with pytest.raises(OutputError, match=r"run\.json does not match its checksum"):
            folder.run()


def test_folder_of_another_format_version_is_foreign(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        publish_json({"format_version": 2}, tmp_path / "out/_m3/run.json", staging=tmp_path / "out/_m3/tmp")
        with pytest.raises(ForeignFolder, match="format version 2, this m3 knows 1"):
            folder.run()


def test_reading_ten_thousand_entries_costs_little_more_than_parsing_them(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        path = write_entry(tmp_path / "out", 0)
        raw = path.read_bytes()
        # Each has its own number and checksum; without fsync, which is slow.
        for index in range(1, 10_000):
            document = entry_document(number_entry(index))
            path.with_name(Path(done_name(index)).name).write_bytes(dumps_with_checksum(document))
        assert path.read_bytes() == raw
        began = time.process_time()
        parsed = [json.loads(entry.read_bytes()) for entry in path.parent.iterdir()]
        parsing = time.process_time() - began
        began = time.process_time()
        assert len(folder.done()) == len(parsed) == 10_000
        ratio = (time.process_time() - began) / parsing
        assert ratio < 10


def test_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"), open_run_folder(tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["_m3/run.json", "_m3/done", "_m3/manifest.json"])
def test_what_cannot_be_looked_at_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    look = os.stat

    def stat(path: Any, **how: Any) -> os.stat_result:
        if str(path) == str(tmp_path / name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return look(path, **how)

    with open_run_folder(tmp_path) as folder:
        write_entry(tmp_path, 0)
        monkeypatch.setattr(os, "stat", stat)
        for answer in ("exists", "is_dir"):  # Path's of Python 3.14 and newer
            monkeypatch.setattr(Path, answer, getattr(os.path, answer.replace("_", "")))
        with pytest.raises(OSError, match="Input/output error"):
            _ = folder.run(), folder.done(), folder.manifest()


def test_document_is_read_without_its_checksum(tmp_path: Path) -> None:
    publish_json({"a": [1, {"b": None}]}, tmp_path / "x.json", staging=tmp_path)
    assert read_json(tmp_path / "x.json") == {"a": [1, {"b": None}]}

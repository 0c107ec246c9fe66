"""The order of durable steps, the state after a crash at each of them, and staged files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import xxhash

from m3cli.config import Format
from m3cli.errors import OutputError
from m3cli.store import commit
from m3cli.store.commit import StagedFile
from m3cli.store.documents import hash_file
from m3cli.store.folder import RunFolder, open_run_folder
from m3cli.store.reader import open_folder
from tests.crash import Crash, crash_at, folder_bytes
from tests.store import samples

NUM_SHARDS = 2


def encode(root: Path, *, format: Format = "npy", skipped: int = 1) -> None:  # noqa: A002 - the flag's name
    """Write run.json, the missing shards and the manifest, as a job does."""
    with open_run_folder(root) as folder:
        if folder.run() is None:
            folder.write_run(samples.make_run())
        done = folder.done()
        for index in range(NUM_SHARDS):
            if index not in done:
                encode_shard(folder, index, format=format, skipped=skipped)
        if folder.manifest() is None:
            assert folder.write_manifest(NUM_SHARDS)


def encode_shard(folder: RunFolder, index: int, *, format: Format = "npy", skipped: int = 1) -> None:  # noqa: A002
    text = samples.make_text(index, skipped=skipped)
    chunks = samples.make_chunks(text, lengths=[[3], [5, 4], [2], [6], [3]])
    with folder.open_shard(form=samples.make_form(format), text=text, chunks=chunks, source="s") as writer:
        for window in samples.cut_windows(samples.make_embeddings(chunks, seed=index), [2, 4]):
            writer.append(window)
        folder.commit(writer.finish())


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_crash_at_any_durable_step_and_resume_give_the_same_bytes(tmp_path: Path, format: Format) -> None:  # noqa: A002
    with crash_at(None) as steps:
        encode(tmp_path / "whole", format=format)
    whole = folder_bytes(tmp_path / "whole")
    assert len(steps.log) > 20
    for step in range(len(steps.log)):
        root = tmp_path / f"crash-{step}"
        with crash_at(step) as crashed:
            encode(root, format=format)
        assert crashed.dead
        if (root / "_m3/run.json").exists():
            assert_existing_files_are_valid(root, whole)
        with crash_at(None):  # no fsync is waited for, but their order is still asserted
            encode(root, format=format)
        assert folder_bytes(root) == whole, steps.log[step]
        shutil.rmtree(root)


def assert_existing_files_are_valid(root: Path, whole: dict[str, bytes]) -> None:
    existing = folder_bytes(root)
    assert {name: whole[name] for name in existing} == existing
    for entry in open_folder(root).entries.values():
        assert {record.name for record in entry.files} <= existing.keys()
    if "_m3/manifest.json" in existing:
        assert existing == whole


def test_data_is_durable_before_its_entry_and_entries_before_the_manifest(tmp_path: Path) -> None:
    with crash_at(None) as steps:
        encode(tmp_path / "out")
    renames = [name for step, name in steps.log if step == "rename"]
    shards = [
        [
            f"{stem}.parquet",
            f"{stem}.npy",
            f"{stem}.npz",
            f"{stem}.npy",
            f"{stem}.indptr.npy",
            f"{stem}.npy",
            f"{stem}.jsonl",
            f"{stem}.json",
        ]
        for stem in ("shard-0000000", "shard-0000001")
    ]
    assert renames == ["run.json", *shards[0], *shards[1], "manifest.json"]
    for index, (step, _) in enumerate(steps.log):
        if step == "rename":  # whose fsync crash_at itself asserts
            assert steps.log[index + 1][0] == "sync_folder"


def test_new_folders_are_durable_before_anything_is_published_in_them(tmp_path: Path) -> None:
    with crash_at(None) as steps:
        encode(tmp_path / "deep" / "out")
    first_rename = [step for step, _ in steps.log].index("rename")
    parents = [name for step, name in steps.log[:first_rename] if step == "sync_folder"]
    assert parents == [tmp_path.name, "deep", "out"]


def test_previous_list_of_skipped_rows_is_removed_if_nothing_is_skipped(tmp_path: Path) -> None:
    with crash_at(None) as steps:
        encode(tmp_path / "count")
    published = [index for index, (step, name) in enumerate(steps.log) if (step, name[-6:]) == ("rename", ".jsonl")]
    with crash_at(published[0] + 2):
        encode(tmp_path / "out")
    assert (tmp_path / "out/_m3/skipped/shard-0000000.jsonl").exists()
    encode(tmp_path / "out", skipped=0)
    assert not (tmp_path / "out/_m3/skipped/shard-0000000.jsonl").exists()


def test_exception_publishes_nothing(tmp_path: Path) -> None:
    def interrupt(root: Path) -> None:
        with open_run_folder(root) as folder:
            text = samples.make_text()
            chunks = samples.make_chunks(text, lengths=[[3]] * 5)
            with folder.open_shard(form=samples.make_form(), text=text, chunks=chunks, source="s") as writer:
                writer.append(samples.take_rows(samples.make_embeddings(chunks), 0, 3))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EIO, "check the disk"),
        (errno.EROFS, "choose an --out"),
    ],
)
@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "rename"])
def test_any_failing_step_is_an_output_error_with_its_remedy(
    tmp_path: Path, step: str, number: int, remedy: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with open_run_folder(tmp_path / "out") as folder:
        with mock.patch.object(commit, step, fail), pytest.raises(OutputError, match=remedy) as caught:
            folder.write_run(samples.make_run())
        assert "run.json" in str(caught.value)
        assert os.strerror(number) in str(caught.value)


def test_crash_harness_rejects_a_rename_without_fsync(tmp_path: Path) -> None:
    (tmp_path / "temp").write_bytes(b"x")
    with crash_at(None), pytest.raises(AssertionError, match="without fsync"):
        commit.publish_file(tmp_path / "temp", tmp_path / "final")


def test_crash_harness_loses_what_was_not_durable(tmp_path: Path) -> None:
    with crash_at(2):  # sync_file, rename, and no sync_folder
        commit.publish_json({"a": 1}, tmp_path / "final.json", staging=make(tmp_path / "tmp"))
    assert not (tmp_path / "final.json").exists()
    with crash_at(0) as steps, pytest.raises(Crash):
        commit.sync_folder(tmp_path)
    assert steps.dead


def test_unwritable_paths_are_errors_before_the_work_starts(tmp_path: Path) -> None:
    for name, words in (
        ("no/such/x.trec", f"there is no folder {tmp_path}/no/such; make it"),
        (".", "it is a folder"),
        ("x" * 250, "File name too long"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(OutputError, match=words):
            commit.check_writable(str(tmp_path / name))
    commit.check_writable(str(tmp_path / "x.trec"))
    commit.check_writable("-")
    commit.check_writable(None)
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_an_error_before_the_work_starts(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied; check who may write there"):
        commit.check_writable(str(tmp_path / "x.trec"))


def test_unreadable_folder_is_an_error_before_the_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: object, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", stat)  # Path.exists raises this error, also in Python 3.10
    with pytest.raises(OutputError, match="Permission denied; check who may write there"):
        commit.check_writable(str(tmp_path / "x.trec"))


def test_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    for content in (b"new", b"newer"):
        with commit.publish_outside(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == content


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("sizes", [[], [0], [5, 0, 7], [3 << 20, 1]])
def test_written_bytes_are_hashed_and_counted(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [bytes(np.arange(size, dtype=np.uint8)) for size in sizes]
    with mock.patch.object(commit, "WRITEBACK", 1 << 20):
        staged = StagedFile(tmp_path, "rows/x")
        for piece in pieces:
            assert staged.write(piece) == len(piece)
        record = staged.seal()
    content = b"".join(pieces)
    assert (tmp_path / "rows--x").read_bytes() == content
    assert (record.name, record.length) == ("rows/x", len(content))
    assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(content)
    assert hash_file(tmp_path / "rows--x") == (record.length, record.xxh3_128)


def test_short_writes_are_continued(tmp_path: Path) -> None:
    staged = StagedFile(tmp_path, "x")
    real = staged._file
    with mock.patch.object(staged, "_file") as slow:
        slow.write.side_effect = lambda view: real.write(view[:3])
        staged.write(b"0123456789")
    staged._file = real
    staged.seal()
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_discarded_file_is_deleted_and_ignores_later_writes(tmp_path: Path) -> None:
    staged = StagedFile(tmp_path, "x")
    staged.write(b"data")
    staged.discard()
    assert staged.write(b"footer") == 6
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_names_path_reason_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/full")
    staged = StagedFile(tmp_path, "x")
    with pytest.raises(OutputError, match=r"cannot write .*/x: No space left on device; free some space"):
        staged.write(b"data")
    staged.discard()

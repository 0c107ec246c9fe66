"""Whether a run may begin: by what is left to do, and what the disk has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m3cli.errors import OutputError
from m3cli.jobs.encode.estimate import check_disk_space, find_free_bytes
from m3cli.records import DoneEntry, FileRecord, Shard, ShardCounts


@pytest.fixture
def free(tmp_path: Path) -> int:
    return shutil.disk_usage(tmp_path).free


def entry(index: int, length: int = 0) -> DoneEntry:
    file = FileRecord(name=f"rows/shard-{index:07d}.parquet", length=length, xxh3_128="")
    shard = Shard(index=index, source=0, start=index, stop=index + 1)
    return DoneEntry(shard=shard, source="a", input_hash="", counts=ShardCounts(), files=(file,))


def test_what_does_not_fit_is_refused_with_need_and_have(tmp_path: Path, free: int) -> None:
    with pytest.raises(OutputError, match=r"needs about .* more and its disk has .* free; .*--no-space-check"):
        check_disk_space(tmp_path, {"rows": 1, "dense": 2 * free}, num_shards=4, done={})


def test_only_shards_that_are_not_done_count(tmp_path: Path, free: int) -> None:
    done = {index: entry(index) for index in range(3)}
    check_disk_space(tmp_path, {"dense": 2 * free}, num_shards=4, done=done)
    with pytest.raises(OutputError, match="--no-space-check"):
        check_disk_space(tmp_path, {"dense": 2 * free}, num_shards=4, done={0: entry(0)})


def test_where_shards_are_not_known_bytes_count(tmp_path: Path, free: int) -> None:
    sizes = {"dense": 2 * free}
    check_disk_space(tmp_path, sizes, num_shards=None, done={0: entry(0, free + free // 2)})
    with pytest.raises(OutputError, match="--no-space-check"):
        check_disk_space(tmp_path, sizes, num_shards=None, done={})


def test_the_first_choice_that_fits_is_named(tmp_path: Path, free: int) -> None:
    choices = {"float16": 2 * free, "--colbert-dtype int8": free, "--colbert-dtype binary": free // 8}
    sizes = {"rows": free // 8, "colbert": 2 * free}
    with pytest.raises(OutputError, match="another --out, try --colbert-dtype binary, or"):
        check_disk_space(tmp_path, sizes, num_shards=None, done={}, choices=choices)
    with pytest.raises(OutputError, match="another --out, or"):
        check_disk_space(tmp_path, sizes, num_shards=None, done={}, choices={"float16": 2 * free})


def test_the_disk_of_a_folder_to_be_is_known(tmp_path: Path, free: int) -> None:
    assert find_free_bytes(tmp_path / "not" / "there") == pytest.approx(free, rel=0.1)

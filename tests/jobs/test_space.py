"""Whether a run may begin: by what is left to do, and what the disk has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m3cli.errors import OutputError
from m3cli.jobs.space import find_free_bytes, refuse_full_disk


@pytest.fixture
def free(tmp_path: Path) -> int:
    return shutil.disk_usage(tmp_path).free


def test_what_does_not_fit_is_refused_with_need_and_have(tmp_path: Path, free: int) -> None:
    with pytest.raises(OutputError, match=r"needs about .* more and its disk has .* free; .*--no-space-check"):
        refuse_full_disk(tmp_path, {"rows": 1, "dense": 2 * free}, todo=4, num_shards=4, bytes_done=0)


def test_only_what_is_left_to_do_counts(tmp_path: Path, free: int) -> None:
    refuse_full_disk(tmp_path, {"dense": 2 * free}, todo=1, num_shards=4, bytes_done=0)


def test_where_shards_are_not_known_bytes_count(tmp_path: Path, free: int) -> None:
    sizes = {"dense": 2 * free}
    refuse_full_disk(tmp_path, sizes, todo=None, num_shards=None, bytes_done=free + free // 2)
    with pytest.raises(OutputError, match="--no-space-check"):
        refuse_full_disk(tmp_path, sizes, todo=None, num_shards=None, bytes_done=0)


def test_the_disk_of_a_folder_to_be_is_known(tmp_path: Path, free: int) -> None:
    assert find_free_bytes(tmp_path / "not" / "there") == pytest.approx(free, rel=0.1)

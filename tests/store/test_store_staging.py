"""A file on its way to be published."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import xxhash

from m3cli.errors import OutputError
from m3cli.store import commit
from m3cli.store.commit import StagedFile
from m3cli.store.documents import hash_file


@pytest.mark.parametrize("sizes", [[], [0], [5, 0, 7], [3 << 20, 1]])
def test_what_passes_through_is_hashed_and_counted(tmp_path: Path, sizes: list[int]) -> None:
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


def test_discarded_file_is_gone_and_takes_a_footer_without_complaint(tmp_path: Path) -> None:
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

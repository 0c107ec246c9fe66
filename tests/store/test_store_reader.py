"""Read folders: by row group, by column, incomplete, missing, damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from m3cli.config import Format
from m3cli.errors import DamageFound, UsageError
from m3cli.records import Embeddings
from m3cli.store import parquet
from m3cli.store.documents import read_entries
from m3cli.store.folder import open_run_folder
from m3cli.store.reader import describe, iter_parts, open_folder, read_shard
from tests.store import samples

FORMATS: list[Format] = ["parquet", "npy"]


def write_shards(root: Path, *, format: Format, shards: int = 3, finish: bool = True) -> list[Embeddings]:  # noqa: A002
    made = []
    with open_run_folder(root) as folder:
        folder.write_run(samples.make_run())
        for index in range(shards):
            documents = 0 if index == 1 else 4
            text = samples.make_text(index, documents=documents, skipped=index)
            chunks = samples.make_chunks(text, lengths=[[3], [5, 4], [2], [6]][:documents])
            made.append(samples.make_embeddings(chunks, seed=index))
            with folder.open_shard(form=samples.make_form(format), text=text, chunks=chunks, source="s") as writer:
                writer.append(made[-1])
                folder.commit(writer.finish())
        if finish:
            folder.write_manifest(shards)
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_parts_in_order_are_all_rows(tmp_path: Path, format: Format) -> None:  # noqa: A002
    with mock.patch.object(parquet, "ROW_GROUP_BYTES", 400):
        made = write_shards(tmp_path / "out", format=format)
    parts = list(iter_parts(open_folder(tmp_path / "out"), columns=["id"]))
    assert [part.shard for part in parts] == sorted(part.shard for part in parts)
    for part in parts:
        rows = part.embeddings.rows
        expected = samples.take_rows(made[part.shard], int(rows[0]), int(rows[-1]) + 1)
        assert samples.same_embeddings(part.embeddings, expected)
        assert part.rows.column_names == ["id"]
        assert part.rows.num_rows == len(rows)
    assert sum(len(part.embeddings.rows) for part in parts) == 10
    assert (len(parts) > 2) == (format == "parquet")


def test_a_folder_completed_while_it_is_opened_is_read_as_incomplete(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_shards(root, format="parquet", shards=1, finish=False)

    def finish_meanwhile(path: Path) -> Any:
        seen = read_entries(path)
        with open_run_folder(path) as folder:
            folder.write_manifest(1)
        return seen

    with mock.patch("m3cli.store.reader.read_entries", finish_meanwhile):
        assert open_folder(root).manifest is None
    assert open_folder(root).manifest is not None


@pytest.mark.parametrize("format", FORMATS)
def test_only_requested_outputs_are_read(tmp_path: Path, format: Format) -> None:  # noqa: A002
    made = write_shards(tmp_path / "out", format=format)
    back = read_shard(open_folder(tmp_path / "out"), 2, outputs=["sparse"], columns=[]).embeddings
    assert back.dense_vecs is None
    assert back.colbert_vecs is None
    assert back.lexical_weights is not None
    expected = made[2].lexical_weights
    assert expected is not None
    assert np.array_equal(back.lexical_weights.values, expected.values)


def test_npy_vectors_are_memory_mapped(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", format="npy")
    back = read_shard(open_folder(tmp_path / "out"), 0).embeddings
    assert isinstance(back.dense_vecs, np.memmap)
    assert back.colbert_vecs is not None
    assert isinstance(back.colbert_vecs.vectors, np.memmap)


def test_done_shards_of_an_incomplete_folder_are_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", format="parquet", shards=2, finish=False)
    folder = open_folder(tmp_path / "out")
    assert folder.run == samples.make_run()
    assert folder.manifest is None
    assert list(folder.entries) == [0, 1]
    assert folder.counts.chunks == 5
    with pytest.raises(UsageError, match="shard 7 is not done"):
        read_shard(folder, 7)
    with pytest.raises(UsageError, match="no column 'title'; there are id, "):
        read_shard(folder, 0, columns=["title"])


def test_missing_and_foreign_folders_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not an m3 folder"):
        open_folder(tmp_path)


def test_damage_is_found_on_opening(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", format="npy")
    (tmp_path / "out/_m3/done/shard-0000001.json").write_bytes(b"{}")
    with pytest.raises(DamageFound, match=r"shard-0000001\.json does not match its checksum"):
        open_folder(tmp_path / "out")


@pytest.mark.parametrize("format", FORMATS)
def test_description_has_all_counts_and_bytes(tmp_path: Path, format: Format) -> None:  # noqa: A002
    write_shards(tmp_path / "out", format=format)
    folder = open_folder(tmp_path / "out")
    seen = describe(folder)
    assert seen.complete
    assert seen.num_shards == 3
    assert (seen.counts.documents, seen.counts.chunks, seen.counts.tokens, seen.counts.skipped) == (8, 10, 40, 3)
    assert list(seen.bytes) == ["rows", "dense", "sparse", "colbert", "_m3"]
    assert folder.manifest is not None
    assert sum(seen.bytes.values()) == folder.manifest.length
    assert seen.bytes["dense"] >= 10 * samples.DIM * 2
    assert seen.bytes["colbert"] >= 30 * samples.DIM * 2
    assert seen.token_histogram == {2: 2, 4: 4, 8: 4}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fault", ["missing", "cut", "longer", "garbled"])
def test_a_damaged_shard_is_an_error(tmp_path: Path, format: Format, fault: str) -> None:  # noqa: A002
    write_shards(tmp_path / "out", format=format)
    folder = open_folder(tmp_path / "out")
    for record in folder.entries[0].files:
        path = folder.path / record.name
        whole = path.read_bytes()
        if fault == "missing":
            path.unlink()
        elif fault == "garbled":
            if "_m3" in record.name:
                continue
            path.write_bytes(b"\xff" * len(whole))
        else:
            path.write_bytes(whole[:-3] if fault == "cut" else whole + b"x")
        for read in (lambda: list(iter_parts(folder)), lambda: read_shard(folder, 0)):
            with pytest.raises(DamageFound, match=r"'m3 check .*out' lists all damage") as found:
                read()
            assert fault == "garbled" or record.name in str(found.value)
        path.write_bytes(whole)
    assert list(iter_parts(folder))

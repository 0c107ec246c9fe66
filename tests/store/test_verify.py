"""Faults of wrong writers, with right hashes, and of changed files; repair."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from m3cli.config import Format
from m3cli.errors import OutputError
from m3cli.records import Chunks, DoneEntry, Embeddings, FileRecord, LexicalWeights, ShardText, TokenMatrices
from m3cli.store.commit import publish_json
from m3cli.store.documents import entry_document, hash_file, read_errors
from m3cli.store.folder import open_run_folder
from m3cli.store.layout import MANIFEST_NAME, RUN_NAME, VECTOR_COLUMNS, done_name, rows_name, scales_name
from m3cli.store.reader import iter_parts, open_folder
from m3cli.store.verify.contents import Expected, check_contents, check_norms
from m3cli.store.verify.ledger import Fault, check_files, find_strays, find_unknown, read_ledger, repair, shards_to_redo
from m3cli.store.verify.rows import find_duplicate_ids
from tests.crash import crash_at, folder_bytes
from tests.store import samples

LENGTHS = [[3], [5, 4], [2], [6], [3]]
NUM_SHARDS = 3
FORMATS: tuple[Format, ...] = ("parquet", "npy")

Change = Callable[[ShardText, Chunks, Embeddings], tuple[ShardText, Chunks, Embeddings]]


def expect(chosen: Format) -> Expected:
    return Expected(form=samples.make_form(chosen), kept=(), max_length=12, merged=False)


def unit(vectors: NDArray[np.float16]) -> NDArray[np.float16]:
    wide = vectors.astype(np.float32)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide.astype(np.float16)


def make_shard(index: int) -> tuple[ShardText, Chunks, Embeddings]:
    text = samples.make_text(index, skipped=index % 2)
    chunks = samples.make_chunks(text, lengths=LENGTHS)
    made = samples.make_embeddings(chunks, seed=index)
    assert made.dense_vecs is not None
    assert made.colbert_vecs is not None
    matrices = TokenMatrices(indptr=made.colbert_vecs.indptr, vectors=unit(made.colbert_vecs.vectors))
    return text, chunks, replace(made, dense_vecs=unit(made.dense_vecs), colbert_vecs=matrices)


def unchanged(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
    return text, chunks, made


def write_folder(
    root: Path, *, chosen: Format = "npy", num_shards: int = NUM_SHARDS, change: Change = unchanged
) -> Path:
    """Write a complete folder; `change` changes the contents of shard 0."""
    with open_run_folder(root) as folder:
        if folder.run() is None:
            folder.write_run(samples.make_run())
        done = folder.done()
        for index in range(num_shards):
            if index not in done:
                text, chunks, made = (change if index == 0 else unchanged)(*make_shard(index))
                form = samples.make_form(chosen)
                with folder.open_shard(form=form, text=text, chunks=chunks, source="s") as writer:
                    writer.append(made)
                    folder.commit(writer.finish())
        if folder.manifest() is None:
            assert folder.write_manifest(num_shards)
    return root


def find_faults(root: Path, *, chosen: Format = "npy") -> list[Fault]:
    ledger = read_ledger(root)
    faults = [*ledger.faults, *find_strays(root, ledger)]
    for entry in ledger.entries.values():
        damaged = check_files(root, entry)
        faults += damaged or check_contents(root, entry, expect(chosen)).faults
    return faults


def read_entry(root: Path, index: int = 0) -> DoneEntry:
    return read_ledger(root).entries[index]


def reseal(root: Path, entry: DoneEntry) -> None:
    """Publish an entry with the hashes of the files as they are now."""
    files = []
    for record in entry.files:
        length, digest = hash_file(root / record.name)
        files.append(FileRecord(name=record.name, length=length, xxh3_128=digest))
    publish_json(
        entry_document(replace(entry, files=tuple(files))),
        root / done_name(entry.shard.index),
        staging=root / "_m3/tmp",
    )


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("documents", [0, 5])
def test_folders_of_the_writers_have_no_fault(tmp_path: Path, chosen: Format, documents: int) -> None:
    def change(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
        if documents:
            return text, chunks, made
        text = samples.make_text(0, documents=0, skipped=2)
        chunks = samples.make_chunks(text, lengths=[])
        return text, chunks, samples.make_embeddings(chunks)

    assert find_faults(write_folder(tmp_path / "out", chosen=chosen, change=change), chosen=chosen) == []


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    root = write_folder(tmp_path_factory.mktemp("sound") / "out")
    return root, folder_bytes(root)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bits_are_found_and_their_file_is_named(
    sound: tuple[Path, dict[str, bytes]], data: st.DataObject
) -> None:
    root, files = sound
    name = data.draw(st.sampled_from(sorted(files)))
    position = data.draw(st.integers(0, len(files[name]) - 1))
    mask = data.draw(st.integers(1, 255))
    raw = bytearray(files[name])
    raw[position] ^= mask
    try:
        (root / name).write_bytes(raw)
        assert [fault.file for fault in find_faults(root)] == [name]
    finally:
        (root / name).write_bytes(files[name])


def with_dense(row: int, value: float) -> Change:
    def change(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
        assert made.dense_vecs is not None
        dense = made.dense_vecs.copy()
        dense[row, 1] = value
        return text, chunks, replace(made, dense_vecs=dense)

    return change


def with_matrix(vector: int, value: float) -> Change:
    def change(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
        assert made.colbert_vecs is not None
        vectors = made.colbert_vecs.vectors.copy()
        vectors[vector] *= np.float16(value)
        return text, chunks, replace(made, colbert_vecs=replace(made.colbert_vecs, vectors=vectors))

    return change


def with_matrix_rows(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
    assert made.colbert_vecs is not None
    indptr = made.colbert_vecs.indptr.copy()
    indptr[2] += 1
    return text, chunks, replace(made, colbert_vecs=replace(made.colbert_vecs, indptr=indptr))


def with_weights(indices: list[int], values: list[float]) -> Change:
    """Give these weights to row 1, of 5 tokens, and none to other rows."""

    def change(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
        weights = LexicalWeights(
            indptr=np.array([0, 0, *[len(indices)] * (chunks.num_rows - 1)], np.int64),
            indices=np.array(indices, np.uint32),
            values=np.array(values, np.float32),
        )
        return text, chunks, replace(made, lexical_weights=weights)

    return change


def with_chunks(**columns: list[int]) -> Change:
    def change(text: ShardText, chunks: Chunks, made: Embeddings) -> tuple[ShardText, Chunks, Embeddings]:
        arrays = {name: np.array(values, getattr(chunks, name).dtype) for name, values in columns.items()}
        return text, replace(chunks, **arrays), made

    return change


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize(
    ("change", "output", "what"),
    [
        (with_dense(4, 2.0), "dense", "row 4: the dense vector's norm is not 1"),
        (with_dense(0, float("nan")), "dense", "row 0: the dense vector's norm is not 1"),
        (with_dense(2, float("inf")), "dense", "row 2: the dense vector's norm is not 1"),
        (with_matrix(2, 1.01), "colbert", "row 1: a ColBERT vector's norm is not 1"),
        (with_matrix(15, 0.0), "colbert", "row 5: a ColBERT vector's norm is not 1"),
        (with_matrix_rows, "colbert", "row 1 (and 1 more): not one ColBERT vector per token except <s>"),
        (with_weights([3, 4], [0.5, 0.0]), "sparse", "row 1: a lexical weight is not finite and above 0"),
        (with_weights([3, 4], [0.5, -1.0]), "sparse", "row 1: a lexical weight is not finite and above 0"),
        (with_weights([3, 4], [float("nan"), 1]), "sparse", "row 1: a lexical weight is not finite and above 0"),
        (with_weights([3, 4], [float("inf"), 1]), "sparse", "row 1: a lexical weight is not finite and above 0"),
        (with_weights([3, samples.VOCABULARY], [1, 1]), "sparse", "row 1: a token id is not below 50"),
        (with_weights([4, 3], [1, 1]), "sparse", "row 1: token ids do not ascend"),
        (with_weights([3, 3], [1, 1]), "sparse", "row 1: token ids do not ascend"),
        (with_weights([1, 2, 3, 4, 5, 6], [1] * 6), "sparse", "row 1: more lexical weights than tokens"),
        (with_chunks(chunk_index=[0, 0, 0, 0, 0, 0]), "rows", "row 2 (and 1 more): chunk_index or num_chunks does not"),
        (with_chunks(chunk_index=[0, 1, 1, 0, 0, 0]), "rows", "row 1 (and 1 more): chunk_index or num_chunks does not"),
        (with_chunks(chunk_index=[1, 0, 1, 0, 0, 0]), "rows", "row 0: chunk_index not below num_chunks"),
        (with_chunks(num_chunks=[1, 2, 2, 1, 1, 2]), "rows", "the last document is incomplete"),
        (with_chunks(num_chunks=[1, 3, 3, 1, 1, 1]), "rows", "row 3: chunk_index or num_chunks does not follow"),
        (with_chunks(document=[0, 0, 1, 2, 3, 4]), "rows", "row 2: chunk_index or num_chunks does not follow"),
        (with_chunks(char_start=[0, 0, 0, 0, 0, 999]), "rows", "row 5: char_end before char_start"),
        (with_chunks(char_start=[0, 9, 5, 0, 0, 0]), "rows", "row 2: span before the previous chunk's"),
    ],
)
def test_wrong_contents_are_found(tmp_path: Path, chosen: Format, change: Change, output: str, what: str) -> None:
    root = write_folder(tmp_path / "out", chosen=chosen, change=change)
    faults = find_faults(root, chosen=chosen)
    assert any(fault.what.startswith(what) for fault in faults), faults
    assert {fault.shard for fault in faults} == {0}
    folder = "rows" if chosen == "parquet" or output == "rows" else VECTOR_COLUMNS[output]  # type: ignore[index]
    assert {fault.file.split("/")[0] for fault in faults} == {folder}
    assert shards_to_redo(faults) == [0]


@pytest.mark.parametrize(
    ("name", "value"), [("documents", 4), ("chunks", 7), ("tokens", 24), ("truncated", 0), ("skipped", 2)]
)
def test_wrong_counts_are_found(tmp_path: Path, name: str, value: int) -> None:
    root = write_folder(tmp_path / "out")
    entry = read_entry(root, 1)
    check = check_contents(root, replace(entry, counts=replace(entry.counts, **{name: value})), expect("npy"))
    assert any(f"the done entry counts {value}" in fault.what for fault in check.faults), check.faults


@pytest.mark.parametrize("name", ["dense_vecs/shard-0000000.npy", "_m3/hashes/shard-0000000.npy"])
@pytest.mark.parametrize("content", ["longer", "shorter", "no array", "another type", "another shape"])
def test_wrong_arrays_are_found(tmp_path: Path, name: str, content: str) -> None:
    root = write_folder(tmp_path / "out")
    path = root / name
    raw, array = path.read_bytes(), np.load(path)
    if content == "another type":
        np.save(path, array.astype(np.float32))
    elif content == "another shape":
        np.save(path, array[:-1])
    else:
        path.write_bytes({"longer": raw + b"x", "shorter": raw[:-1], "no array": b"x" * len(raw)}[content])
    entry = read_entry(root)
    reseal(root, entry)
    assert [fault.file for fault in check_contents(root, read_entry(root), expect("npy")).faults] == [name]


def test_invalid_weights_and_rows_are_found(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "out")
    weights = root / "lexical_weights/shard-0000000.npz"
    np.savez(weights, data=np.zeros(1), indices=np.zeros(1))
    (root / rows_name(1)).write_bytes(b"PAR1 no such thing PAR1")
    for index in (0, 1):
        reseal(root, read_entry(root, index))
        faults = check_contents(root, read_entry(root, index), expect("npy")).faults
        assert len(faults) == 1
        assert faults[0].what.startswith("cannot be read: ")


def test_rows_of_another_form_are_found(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "out", chosen="parquet")
    entry = read_entry(root)
    form = samples.make_form("parquet", dense_dtype="float32")
    assert "column dense_vecs is" in check_contents(root, entry, replace(expect("parquet"), form=form)).faults[0].what
    kept = replace(expect("parquet"), kept=("lang",))
    assert "has columns id, chunk_index" in check_contents(root, entry, kept).faults[0].what
    assert "does not belong to such a shard" not in str(check_contents(root, entry, expect("parquet")).faults)
    named = {fault.what for fault in check_contents(root, entry, expect("npy")).faults}
    assert named == {"is missing in the done entry"}


def test_manifest_of_other_entries_and_another_run_are_found(tmp_path: Path) -> None:
    root, other = write_folder(tmp_path / "out"), write_folder(tmp_path / "other", change=with_dense(1, 2.0))
    shutil.copyfile(other / done_name(0), root / done_name(0))
    shutil.copyfile(other / "dense_vecs/shard-0000000.npy", root / "dense_vecs/shard-0000000.npy")
    with open_run_folder(tmp_path / "third") as folder:
        folder.write_run(samples.make_run(prefix="other"))
    shutil.copyfile(tmp_path / "third" / RUN_NAME, root / RUN_NAME)
    faults = read_ledger(root).faults
    assert [(fault.file, fault.cure) for fault in faults] == [(RUN_NAME, "none"), (done_name(0), "redo")]
    assert all("is not the one that _m3/manifest.json was written for" in fault.what for fault in faults)


def test_other_files_in_a_folder_are_no_faults(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "out")
    (root / "README.md").write_text("a dataset card")
    (root / "_m3/run.log").write_text("a log")
    (root / "_m3/lock.0-of-2").touch()
    assert find_faults(root) == []
    (root / "rows/.hidden").touch()
    (root / "_m3/more").mkdir()
    (root / "_m3/done/deeper").mkdir()
    assert find_faults(root) == []
    assert set(find_unknown(root)) == {"rows/.hidden", "_m3/more", "_m3/done/deeper"}


def test_empty_folder_is_no_damage_and_a_missing_run_json_is(tmp_path: Path) -> None:
    assert read_ledger(tmp_path).faults == ()
    write_folder(tmp_path / "out")
    (tmp_path / "out" / RUN_NAME).unlink()
    assert [fault.what for fault in find_faults(tmp_path / "out")] == ["is missing"]


def test_unreadable_disk_is_damage_and_a_forbidden_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot be read: Input/output error"), read_errors(tmp_path):
        raise OSError(5, "Input/output error")
    with pytest.raises(OutputError, match="run m3 as a user who may read it"), read_errors(tmp_path):
        raise OSError(13, "Permission denied")


def test_a_mount_that_is_away_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "out")
    lost = OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    folder = open_folder(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", mock.Mock(side_effect=lost))
        with pytest.raises(OutputError, match="is not connected; run the same command again"):
            find_faults(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("m3cli.store.reader.pq.ParquetFile", mock.Mock(side_effect=lost))
        with pytest.raises(OutputError, match="is not connected; run the same command again"):
            list(iter_parts(folder))
    assert find_faults(tmp_path / "out") == []


def test_duplicate_ids_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "out")
    hashes = {}
    for index in range(NUM_SHARDS):
        check = check_contents(root, read_entry(root, index), expect("npy"))
        hashes[index] = np.concatenate(check.id_hashes)
        assert len(hashes[index]) == 5
    assert find_duplicate_ids(root, hashes).count == 0
    hashes[2] = np.concatenate([hashes[2], hashes[1][3:]])
    found = find_duplicate_ids(root, hashes)
    assert (found.count, set(found.examples)) == (2, {"1-3", "1-4"})
    assert find_duplicate_ids(root, {}).count == 0


def test_norms_allow_for_the_rounding_of_float16() -> None:
    random = np.random.default_rng(0)
    for dim in (8, 384, 1024):
        vectors = unit(random.standard_normal((3000, dim)).astype(np.float16))
        assert not check_norms(vectors).any()
        assert check_norms((vectors.astype(np.float32) * 1.003).astype(np.float16)).all()
    assert list(check_norms(np.empty((0, 8), np.float16))) == []


@pytest.mark.parametrize("chosen", FORMATS)
def test_repair_that_stops_at_any_step_leaves_a_valid_folder(tmp_path: Path, chosen: Format) -> None:
    whole = write_folder(tmp_path / "whole", chosen=chosen)

    def damage(root: Path) -> list[Fault]:
        shutil.copytree(whole, root)
        (root / rows_name(1)).write_bytes(b"")
        (root / done_name(2)).write_bytes(b"{}")
        (root / "colbert_vecs").mkdir(exist_ok=True)
        (root / scales_name(0)).touch()
        return find_faults(root, chosen=chosen)

    faults = damage(tmp_path / "count")
    with crash_at(None) as steps:
        repair(tmp_path / "count", faults)
    first_data = next(index for index, (step, name) in enumerate(steps.log) if step == "remove" and "json" not in name)
    assert steps.log[:2] == [("remove", "manifest.json"), ("sync_folder", "_m3")]
    assert steps.log[2:5] == [
        ("remove", "shard-0000001.json"),
        ("remove", "shard-0000002.json"),
        ("sync_folder", "done"),
    ]
    assert first_data == 5
    for step in range(len(steps.log)):
        root = tmp_path / "out"
        damage(root)
        with crash_at(step):
            repair(root, faults)
        remaining = find_faults(root, chosen=chosen)
        assert {fault.file for fault in remaining} <= {fault.file for fault in faults}
        assert (root / MANIFEST_NAME).exists() is (step < 2)
        repair(root, remaining)
        assert find_faults(root, chosen=chosen) == []
        assert folder_bytes(write_folder(root, chosen=chosen)) == folder_bytes(whole)
        shutil.rmtree(root)

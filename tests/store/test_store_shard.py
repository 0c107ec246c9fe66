"""A shard, written and read back; its columns and sizes."""

from __future__ import annotations

import errno
import os
import tempfile  # noqa: TID251 - hypothesis needs a new folder for each example
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.config import ColbertForm, Format
from m3cli.errors import OutputError
from m3cli.records import Embeddings, Output
from m3cli.store import parquet
from m3cli.store.folder import open_run_folder
from m3cli.store.layout import RESERVED_COLUMNS, RowForm, estimate_bytes, row_schema
from m3cli.store.reader import ShardArrays, open_folder, read_shard
from tests.crash import crash_at, folder_bytes
from tests.store import samples

LENGTHS = [[4, 7], [3], [9, 9, 2], [2], [5]]
FORMATS: tuple[Format, ...] = ("parquet", "npy")
OUTPUTS: list[tuple[Output, ...]] = [("dense", "sparse", "colbert"), ("dense",), ("sparse",), ("colbert",)]


def write_folder(
    root: Path,
    form: RowForm,
    *,
    lengths: Sequence[Sequence[int]] = LENGTHS,
    cuts: Sequence[int] = (),
    skipped: int = 0,
) -> Embeddings:
    text = samples.make_text(documents=len(lengths), skipped=skipped, kept=form.kept is not None)
    chunks = samples.make_chunks(text, lengths=lengths)
    embeddings = samples.make_embeddings(chunks, outputs=form.outputs)
    with open_run_folder(root) as folder:
        folder.write_run(samples.make_run())
        with folder.open_shard(form=form, text=text, chunks=chunks, source="corpus.jsonl") as writer:
            for window in samples.cut_windows(embeddings, cuts):
                writer.append(window)
            folder.commit(writer.finish())
        folder.write_manifest(1)
    return embeddings


def read_back(root: Path) -> ShardArrays:
    return read_shard(open_folder(root), 0)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=3), max_size=8),
    cuts=st.lists(st.integers(1, 20), max_size=5),
    group_bytes=st.sampled_from([1, 300, 1000, 64 << 20]),
    outputs=st.sampled_from(OUTPUTS),
    kept=st.booleans(),
)
def test_any_windows_give_the_same_arrays_and_bytes_in_both_formats(
    lengths: list[list[int]], cuts: list[int], group_bytes: int, outputs: tuple[Output, ...], kept: bool
) -> None:
    with (
        tempfile.TemporaryDirectory() as tmp,
        mock.patch.object(parquet, "ROW_GROUP_BYTES", group_bytes),
        crash_at(None),  # without fsync
    ):
        for chosen in FORMATS:
            schema = samples.KEPT if kept else None
            form = samples.make_form(chosen, outputs=outputs, keep_text=kept, kept=schema)
            whole, cut = Path(tmp, form.format, "whole"), Path(tmp, form.format, "cut")
            embeddings = write_folder(whole, form, lengths=lengths)
            write_folder(cut, form, lengths=lengths, cuts=cuts)
            assert folder_bytes(whole) == folder_bytes(cut)
            assert samples.same_embeddings(read_back(cut).embeddings, embeddings)


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_rows_carry_ids_spans_kept_fields_and_text(tmp_path: Path, format: str) -> None:  # noqa: A002
    form = samples.make_form(format, kept=samples.KEPT, keep_text=True)  # type: ignore[arg-type]
    write_folder(tmp_path / "out", form, cuts=[3])
    rows = read_back(tmp_path / "out").rows.to_pydict()
    text = samples.make_text(kept=True)
    assert rows["id"] == ["0-0", "0-0", "0-1", "0-2", "0-2", "0-2", "0-3", "0-4"]
    assert rows["chunk_index"] == [0, 1, 0, 0, 1, 2, 0, 0]
    assert rows["num_chunks"] == [2, 2, 1, 3, 3, 3, 1, 1]
    assert rows["num_tokens"] == [4, 7, 3, 9, 9, 2, 2, 5]
    assert rows["truncated"] == [False, False, True, True, True, False, False, False]
    assert rows["lang"] == [None, None, "fr", None, None, None, "fr", None]
    assert rows["tags"][-1] == ["a"]
    assert rows["text"][2] == text.documents[1].text[rows["char_start"][2] : rows["char_end"][2]]


def test_parquet_matrix_is_read_with_frombuffer(tmp_path: Path) -> None:
    embeddings = write_folder(tmp_path / "out", samples.make_form())
    table = pq.read_table(tmp_path / "out/rows/shard-0000000.parquet")
    field = table.schema.field("colbert_vecs")
    assert str(field.type) == "large_binary"
    assert field.metadata[b"dtype"] == b"float16"
    assert field.metadata[b"dim"] == b"8"
    assert str(table.schema.field("dense_vecs").type).startswith("fixed_size_list<")
    row = np.frombuffer(table.column("colbert_vecs")[1].as_py(), np.float16).reshape(-1, samples.DIM)
    assert embeddings.colbert_vecs is not None
    assert np.array_equal(row, embeddings.colbert_vecs.vectors[3:9])


def test_npy_files_open_with_numpy_and_scipy(tmp_path: Path) -> None:
    embeddings = write_folder(tmp_path / "out", samples.make_form("npy", dense_dtype="float32"), cuts=[2])
    dense = np.load(tmp_path / "out/dense_vecs/shard-0000000.npy", mmap_mode="r")
    assert dense.dtype == np.float32
    assert np.array_equal(dense, embeddings.dense_vecs)  # type: ignore[arg-type]
    sparse = scipy.sparse.load_npz(tmp_path / "out/lexical_weights/shard-0000000.npz")
    assert sparse.format == "csr"
    assert sparse.shape == (8, samples.VOCABULARY)
    assert sparse.dtype == np.float32
    assert embeddings.lexical_weights is not None
    assert np.array_equal(sparse.indices, embeddings.lexical_weights.indices)
    vectors = np.load(tmp_path / "out/colbert_vecs/shard-0000000.npy", mmap_mode="r")
    indptr = np.load(tmp_path / "out/colbert_vecs/shard-0000000.indptr.npy")
    assert vectors.shape == (indptr[-1], samples.DIM)
    assert indptr.dtype == np.int64


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_shard_without_rows_still_writes_its_files(tmp_path: Path, format: str) -> None:  # noqa: A002
    form = samples.make_form(format, kept=samples.KEPT)  # type: ignore[arg-type]
    write_folder(tmp_path / "full", form)
    write_folder(tmp_path / "none", form, lengths=[], skipped=2)
    schemas = [pq.read_schema(tmp_path / name / "rows/shard-0000000.parquet") for name in ("full", "none")]
    assert schemas[0].equals(schemas[1], check_metadata=True)
    extra = {"_m3/skipped/shard-0000000.jsonl"}
    assert set(folder_bytes(tmp_path / "none")) == set(folder_bytes(tmp_path / "full")) | extra
    back = read_back(tmp_path / "none")
    assert back.rows.num_rows == 0
    assert back.embeddings.dense_vecs is not None
    assert back.embeddings.dense_vecs.shape == (0, samples.DIM)


def test_row_group_never_exceeds_its_bytes_unless_it_is_one_row(tmp_path: Path) -> None:
    with mock.patch.object(parquet, "ROW_GROUP_BYTES", 300):
        write_folder(tmp_path / "out", samples.make_form(outputs=("colbert",)))
    metadata = pq.ParquetFile(tmp_path / "out/rows/shard-0000000.parquet").metadata
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    # 64 + 3 of the id + 16 * vectors a row: 115 163 | 99 195 | 195 83 | 83 131
    assert groups == [2, 2, 2, 2]


def test_a_row_group_of_long_texts_is_bounded(tmp_path: Path) -> None:
    form = samples.make_form("npy", outputs=("dense",), keep_text=True)
    text = samples.make_text(documents=9)
    documents = tuple(replace(document, text="x" * 1000) for document in text.documents)
    text = replace(text, documents=documents)
    chunks = samples.make_chunks(text, lengths=[[3]] * 9)
    # A chunk's text is 667 of the 1,000 characters.
    with mock.patch.object(parquet, "ROW_GROUP_BYTES", 3000), open_run_folder(tmp_path / "out") as folder:
        folder.write_run(samples.make_run())
        with folder.open_shard(form=form, text=text, chunks=chunks, source="s") as writer:
            writer.append(samples.make_embeddings(chunks, outputs=("dense",)))
            folder.commit(writer.finish())
    metadata = pq.ParquetFile(tmp_path / "out/rows/shard-0000000.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4, 4, 1]


KINDS = [
    (pa.array(["a", None, "ccc"]).slice(1), [0, 3]),
    (pa.array([["a"], None, ["bb", "c"]]).slice(1), [0, 3]),
    (pa.array([{"a": "x", "b": 1}, None]), [9, 8]),
    (pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)).slice(1), [8]),
    (pa.array([[("k", "vv")], []], pa.map_(pa.string(), pa.string())), [3, 0]),
    (pa.array(["aa", "aa"]).dictionary_encode(), [2, 2]),
    (pa.array([Decimal("1.1")]), [16]),
    (pa.array([None, None]), [0, 0]),
    (pa.array([b"abc"], pa.binary(3)), [3]),
    (pa.array(["x", "yyy"], pa.string_view()), [1, 3]),
    (pa.array([1.5]), [8]),
]


@pytest.mark.parametrize(("values", "sizes"), KINDS, ids=[str(values.type) for values, _ in KINDS])
def test_values_of_every_kind_have_a_size(values: pa.Array, sizes: list[int]) -> None:
    assert parquet._value_bytes(values).tolist() == sizes


def test_skipped_rows_and_hashes(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", samples.make_form(), skipped=2)
    lines = (tmp_path / "out/_m3/skipped/shard-0000000.jsonl").read_bytes().splitlines()
    first, second = map(orjson.loads, lines)
    assert list(first) == ["source", "position", "byte_offset", "id", "reason", "detail", "row"]
    assert first["id"] is None
    assert second["id"] == "\\ud800"
    assert first["row"] == "\\xff" + "x" * ((64 << 10) - 1)
    hashes = np.load(tmp_path / "out/_m3/hashes/shard-0000000.npy")
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [list(document.text_hash) for document in samples.make_text().documents]


def test_entry_lists_every_file_and_counts(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", samples.make_form("npy"), skipped=1)
    entry = open_folder(tmp_path / "out").entries[0]
    data = {name for name in folder_bytes(tmp_path / "out") if not name.endswith(".json")}
    assert {record.name for record in entry.files} == data
    assert (entry.counts.documents, entry.counts.chunks, entry.counts.tokens) == (5, 8, 41)
    assert (entry.counts.skipped, entry.counts.truncated, entry.counts.missing_ids) == (1, 3, 2)


def test_missing_rows_and_gaps_are_errors(tmp_path: Path) -> None:
    text = samples.make_text(documents=2)
    chunks = samples.make_chunks(text, lengths=[[3], [4]])
    embeddings = samples.make_embeddings(chunks)
    with open_run_folder(tmp_path / "out") as folder:
        with folder.open_shard(form=samples.make_form(), text=text, chunks=chunks, source="s") as writer:
            with pytest.raises(ValueError, match="row 0"):
                writer.append(samples.take_rows(embeddings, 1, 2))
            writer.append(samples.take_rows(embeddings, 0, 1))
            with pytest.raises(ValueError, match="2 rows were planned, 1 appended"):
                writer.finish()
        assert list((tmp_path / "out/_m3/tmp").rglob("*.parquet")) == []


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_a_disk_that_is_lost_is_an_output_error(tmp_path: Path, format: str) -> None:  # noqa: A002
    def fail(staged: Any, _: object) -> None:
        os.close(staged._file.fileno())  # the file's own close fails then, as on a lost mount
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    with (
        mock.patch("m3cli.store.commit.StagedFile._write_piece", fail),
        pytest.raises(OutputError, match="Transport endpoint is not connected; run the same command again"),
    ):
        write_folder(tmp_path / "out", samples.make_form(format))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path, format: str) -> None:  # noqa: A002
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    form = samples.make_form(format)  # type: ignore[arg-type]
    with (
        mock.patch("m3cli.store.commit.StagedFile._write_piece", fail),
        pytest.raises(OutputError, match="No space left on device; free some space"),
    ):
        write_folder(tmp_path / "out", form)
    assert list(folder_bytes(tmp_path / "out")) == ["_m3/run.json"]


def test_columns_come_in_the_order_of_the_contract() -> None:
    kept = pa.schema([pa.field("lang", pa.string(), metadata={"PARQUET:field_id": "3"})], metadata={"pandas": "{}"})
    schema = row_schema(samples.make_form(kept=kept, keep_text=True))
    columns = ["id", "chunk_index", "num_chunks", "char_start", "char_end", "num_tokens", "truncated"]
    assert schema.names == [*columns, "lang", "text", "dense_vecs", "lexical_weights", "colbert_vecs"]
    assert schema.field("dense_vecs").type == pa.list_(pa.float16(), samples.DIM)
    lists = [("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))]
    assert schema.field("lexical_weights").type == pa.struct(lists)
    assert schema.field("lang").metadata is None
    assert schema.metadata is None


def test_npy_rows_have_no_vector_columns() -> None:
    assert not {"dense_vecs", "lexical_weights", "colbert_vecs"} & set(row_schema(samples.make_form("npy")).names)


def test_every_column_of_m3_is_reserved() -> None:
    form = replace(samples.make_form(keep_text=True), colbert=ColbertForm(dtype="int8"))
    assert set(row_schema(form).names) == RESERVED_COLUMNS


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_estimate_is_near_the_written_size(tmp_path: Path, format: str) -> None:  # noqa: A002
    form = samples.make_form(format, outputs=("dense", "colbert"))  # type: ignore[arg-type]
    write_folder(tmp_path / "out", form, lengths=[[40]] * 2000)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("shard-*") if "_m3" not in path.parts)
    guess = estimate_bytes(form, documents=2000, rows=2000, weights=0, vectors=78_000)
    assert list(guess) == ["rows", "dense", "colbert", "_m3"]
    assert guess.pop("_m3") == 2000 * 16
    assert 0.9 < sum(guess.values()) / written < 1.1

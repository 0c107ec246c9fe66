"""Names, columns and sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from m3cli.config import ColbertForm
from m3cli.store.layout import RESERVED_COLUMNS, estimate_bytes, row_schema
from tests.store import samples
from tests.store.test_store_shard import write_folder


def test_columns_come_in_the_order_of_the_contract() -> None:
    kept = pa.schema([pa.field("lang", pa.string(), metadata={"PARQUET:field_id": "3"})], metadata={"pandas": "{}"})
    schema = row_schema(samples.make_form(kept=kept, keep_text=True))
    ours = ["id", "chunk_index", "num_chunks", "char_start", "char_end", "num_tokens", "truncated"]
    assert schema.names == [*ours, "lang", "text", "dense_vecs", "lexical_weights", "colbert_vecs"]
    assert schema.field("dense_vecs").type == pa.list_(pa.float16(), samples.DIM)
    lists = [("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))]
    assert schema.field("lexical_weights").type == pa.struct(lists)
    assert schema.field("lang").metadata is None
    assert schema.metadata is None


def test_npy_rows_have_no_vector_columns() -> None:
    assert not {"dense_vecs", "lexical_weights", "colbert_vecs"} & set(row_schema(samples.make_form("npy")).names)


def test_every_column_of_ours_is_reserved() -> None:
    form = replace(samples.make_form(keep_text=True), colbert=ColbertForm(dtype="int8"))
    assert set(row_schema(form).names) == RESERVED_COLUMNS


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_estimate_is_near_what_is_written(tmp_path: Path, format: str) -> None:  # noqa: A002
    form = samples.make_form(format, outputs=("dense", "colbert"))  # type: ignore[arg-type]
    write_folder(tmp_path / "out", form, lengths=[[40]] * 2000)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("shard-*") if "_m3" not in path.parts)
    guess = estimate_bytes(form, documents=2000, rows=2000, weights=0, vectors=78_000)
    assert list(guess) == ["rows", "dense", "colbert", "_m3"]
    assert guess.pop("_m3") == 2000 * 16
    assert 0.9 < sum(guess.values()) / written < 1.1

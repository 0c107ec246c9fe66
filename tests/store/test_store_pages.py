"""Dense vectors from Parquet pages are equal to what Arrow reads; other pages are left to Arrow."""

from __future__ import annotations

import tempfile  # noqa: TID251 - hypothesis needs a new folder for each example
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from m3cli.store.parquet import DensePages


def write(path: Path, vectors: NDArray[Any], *, groups: int = 1, **options: Any) -> pq.ParquetFile:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    # Nested columns before and after, so that the index of a leaf is not that of its column.
    table = pa.table({"first": [[1, 2]] * len(vectors), "dense_vecs": column, "last": ["x"] * len(vectors)})
    size = -(-len(vectors) // groups) or None
    pq.write_table(table, path, row_group_size=size, **{"compression": "none", "use_dictionary": False, **options})
    return pq.ParquetFile(path)


def draw(rows: int, dim: int, dtype: str = "float16") -> NDArray[Any]:
    return np.random.default_rng(rows).standard_normal((rows, dim)).astype(dtype)


@given(
    rows=st.integers(1, 300),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(["float16", "float32"]),
    groups=st.integers(1, 4),
    page=st.integers(1, 5000),
    compression=st.sampled_from(["none", "zstd", "snappy"]),
    statistics=st.booleans(),
)
def test_the_vectors_are_those_that_were_written(
    rows: int, dim: int, dtype: str, groups: int, page: int, compression: str, statistics: bool
) -> None:
    vectors = draw(rows, dim, dtype)
    options = {"data_page_size": page, "write_batch_size": 7, "compression": compression}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        with write(path, vectors, groups=groups, write_statistics=statistics, **options) as file:
            pages = DensePages(file, path)
            read = [part for group in range(file.num_row_groups) if (part := pages.read(group)) is not None]
    assert {part.dtype for part in read} == {np.dtype(dtype)}
    assert np.concatenate(read).tobytes() == vectors.tobytes()


@pytest.mark.parametrize("options", [{"data_page_version": "2.0"}, {"use_dictionary": True}])
def test_other_pages_are_left_to_arrow(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "rows.parquet"
    with write(path, draw(40, 8, "float32"), **options) as file:
        assert DensePages(file, path).read(0) is None


@pytest.mark.parametrize("missing", ["a value", "a list"])
def test_missing_values_are_left_to_arrow(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "rows.parquet"
    rows: list[Any] = [[1.0, 2.0], None if missing == "a list" else [None, 1.0]]
    pq.write_table(
        pa.table({"dense_vecs": pa.array(rows, pa.list_(pa.float32(), 2))}), path, compression="none", use_dictionary=[]
    )
    with pq.ParquetFile(path) as file:
        assert DensePages(file, path).read(0) is None


@given(damage=st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_page_is_no_error(damage: list[tuple[int, int]]) -> None:
    """Whatever the damage is: the result is None or has the right shape."""
    vectors = draw(30, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        with write(path, vectors) as file:
            first = file.metadata.row_group(0).column(1).data_page_offset
            content = bytearray(path.read_bytes())
            for offset, byte in damage:
                content[first + offset] = byte
            path.write_bytes(content)
            read = DensePages(file, path).read(0)
    assert read is None or read.shape == vectors.shape


def test_a_file_that_ends_within_a_page_is_left_to_arrow(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with write(path, draw(30, 4)) as file:
        path.write_bytes(path.read_bytes()[:150])
        assert DensePages(file, path).read(0) is None

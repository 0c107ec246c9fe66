"""Shards and matrices of 2^31 bytes and more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from m3cli.records import Embeddings, TokenMatrices
from m3cli.store.folder import open_run_folder
from m3cli.store.layout import MAX_MATRIX_BYTES, colbert_name, rows_name
from m3cli.store.parquet import ROW_GROUP_BYTES
from m3cli.store.reader import iter_parts, open_folder
from m3cli.store.verify.contents import Expected, check_contents
from tests.store import samples

pytestmark = pytest.mark.slow

DIM, TOKENS, ROWS, AT_ONCE = 1024, 4001, 270, 10
VECTOR_BYTES = DIM * 2


def make_windows() -> Iterator[Embeddings]:
    """Yield windows in which the vectors of row r are r."""
    for start in range(0, ROWS, AT_ONCE):
        rows = np.arange(start, start + AT_ONCE)
        matrices = TokenMatrices(
            indptr=np.arange(AT_ONCE + 1, dtype=np.int64) * (TOKENS - 1),
            vectors=np.repeat(rows, TOKENS - 1).astype(np.float16)[:, None].repeat(DIM, axis=1),
        )
        yield Embeddings(rows=rows, dense_vecs=None, lexical_weights=None, colbert_vecs=matrices)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_more_than_two_gib_of_vectors_in_a_shard(tmp_path: Path, format: str, exact: bool) -> None:  # noqa: A002
    form = replace(samples.make_form(format, outputs=("colbert",)), dim=DIM, exact_vectors=exact)  # type: ignore[arg-type]
    text = samples.make_text(documents=ROWS)
    chunks = samples.make_chunks(text, lengths=[[TOKENS]] * ROWS)
    out = tmp_path / "out"
    with open_run_folder(out) as folder:
        folder.write_run(samples.make_run())
        with folder.open_shard(form=form, text=text, chunks=chunks, source="corpus.jsonl") as writer:
            for window in make_windows():
                writer.append(window)
            folder.commit(writer.finish())
    name = rows_name(0) if format == "parquet" else colbert_name(0)
    assert (out / name).stat().st_size > 2**31
    if format == "parquet":
        metadata = pq.ParquetFile(out / name).metadata
        groups = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        assert max(groups) < 1.1 * ROW_GROUP_BYTES
    seen = 0
    for part in iter_parts(open_folder(out), outputs=("colbert",), columns=["num_tokens"]):
        matrices = part.embeddings.colbert_vecs
        assert matrices is not None
        assert (np.diff(matrices.indptr) == TOKENS - 1).all()
        firsts, lasts = matrices.vectors[matrices.indptr[:-1]], matrices.vectors[matrices.indptr[1:] - 1]
        for values in (firsts, lasts):
            assert np.array_equal(values[:, 0], part.embeddings.rows.astype(np.float16))
            assert np.array_equal(values[:, -1], part.embeddings.rows.astype(np.float16))
        seen += len(part.embeddings.rows)
    assert seen == ROWS


@pytest.mark.skipif(
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 14 << 30, reason="takes 11 GiB of memory"
)
def test_the_longest_matrix_that_parquet_holds(tmp_path: Path) -> None:
    num_vectors = MAX_MATRIX_BYTES // VECTOR_BYTES
    vectors = np.zeros((num_vectors, DIM), np.float16)
    vectors[:, 0] = 1
    vectors[-1] = np.eye(1, DIM, DIM - 1)
    form = replace(samples.make_form("parquet", outputs=("colbert",)), dim=DIM)
    text = samples.make_text(documents=2)
    chunks = samples.make_chunks(text, lengths=[[num_vectors + 1], [4]])
    with open_run_folder(tmp_path / "out") as folder:
        folder.write_run(samples.make_run())
        with folder.open_shard(form=form, text=text, chunks=chunks, source="corpus.jsonl") as writer:
            for row, matrix in enumerate((vectors, vectors[:3])):
                matrices = TokenMatrices(indptr=np.array([0, len(matrix)]), vectors=matrix)
                rows = np.array([row])
                writer.append(Embeddings(rows=rows, dense_vecs=None, lexical_weights=None, colbert_vecs=matrices))
            entry = writer.finish()
            folder.commit(entry)
    lengths = []
    for part in iter_parts(open_folder(tmp_path / "out"), outputs=("colbert",), columns=["num_tokens"]):
        found = part.embeddings.colbert_vecs
        assert found is not None
        lengths += np.diff(found.indptr).tolist()
        if part.embeddings.rows[0] == 0:
            assert (found.vectors[num_vectors - 1] == vectors[-1]).all()
            assert (found.vectors[: num_vectors - 1, 0] == 1).all()
        del found, part
    assert lengths == [num_vectors, 3]
    expected = Expected(form=form, kept=(), max_length=num_vectors + 1, merged=True)
    assert not check_contents(tmp_path / "out", entry, expected).faults

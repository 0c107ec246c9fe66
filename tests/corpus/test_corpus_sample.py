"""Samples of files: complete rows, whose factors add up to the input."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.corpus.fields import resolve_fields
from m3cli.corpus.plan import Sample, plan_shards, sample_shards
from m3cli.corpus.sources import find_sources

SIZE, NUMBER = 100, 6


def sample(*paths: Path, max_row_bytes: int = 1 << 20) -> list[Sample]:
    sources = find_sources([str(path) for path in paths])
    plan = plan_shards(sources, fields=resolve_fields(sources), shard_size=SIZE)
    return sample_shards(sources, plan, number=NUMBER, max_row_bytes=max_row_bytes)


def count_rows(samples: list[Sample], content: bytes) -> float:
    return sum(content[one.shard.start : one.shard.stop].count(b"\n") * one.factor for one in samples)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60))
def test_samples_are_complete_rows_and_represent_all_bytes(tmp_path_factory, lengths: list[int]) -> None:  # type: ignore[no-untyped-def]
    content = b"".join(b"x" * length + b"\n" for length in lengths)
    path = tmp_path_factory.mktemp("sample") / "a.txt"
    path.write_bytes(content)
    samples = sample(path)
    for one in samples:
        assert one.shard.start == 0 or content[one.shard.start - 1 : one.shard.start] == b"\n"
        assert content[one.shard.stop - 1 : one.shard.stop] == b"\n"
    assert [one.shard.index for one in samples] == list(range(len(samples)))
    represented = sum((one.shard.stop - one.shard.start) * one.factor for one in samples)
    assert abs(represented - len(content)) < 1e-6
    if len(content) <= SIZE * NUMBER:
        assert abs(count_rows(samples, content) - len(lengths)) < 1e-6


def test_a_row_counts_once_however_many_windows_it_fills(tmp_path: Path) -> None:
    content = b"x" * 5000 + b"\n"
    (tmp_path / "a.txt").write_bytes(content)
    assert count_rows(sample(tmp_path / "a.txt"), content) == 1


def test_rows_longer_than_windows_are_counted_by_their_length(tmp_path: Path) -> None:
    content = (b"x" * 999 + b"\n") * 200
    (tmp_path / "a.txt").write_bytes(content)
    assert abs(count_rows(sample(tmp_path / "a.txt"), content) - 200) < 1e-6


def test_a_row_that_is_too_long_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x\n" * 50 + b"x" * (4 << 20) + b"\n")
    assert [one.shard.stop for one in sample(tmp_path / "a.txt", max_row_bytes=1000)] == [100]


def test_of_parquet_rows_are_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(500)]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_bytes(b"x\n" * 500)
    samples = sample(tmp_path / "a.parquet", tmp_path / "b.txt")
    for source in (0, 1):
        found = [one for one in samples if one.shard.source == source]
        assert 0 < len(found) <= NUMBER
        rows = sum((one.shard.stop - one.shard.start) * one.factor for one in found) / (1 if source == 0 else 2)
        assert abs(rows - 500) < 1e-6

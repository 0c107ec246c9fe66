from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.corpus.fields import resolve_fields
from m3cli.corpus.plan import Plan, plan_shards
from m3cli.corpus.sources import find_sources


def plan(*paths: Path, shard_size: int, limit: int | None = None) -> Plan:
    sources = find_sources([str(path) for path in paths])
    return plan_shards(sources, fields=resolve_fields(sources), shard_size=shard_size, limit=limit)


def spans(planned: Plan) -> list[tuple[int, int, int, int]]:
    assert [shard.index for shard in planned.shards] == list(range(len(planned.shards)))
    return [(shard.source, shard.row_group, shard.start, shard.stop) for shard in planned.shards]


def test_plain_file_is_cut_by_its_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 25)
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"x" * 10)
    sources = find_sources([str(tmp_path)])
    fields = resolve_fields(sources)
    monkeypatch.setattr("m3cli.corpus.plan.ByteStream", None)
    planned = plan_shards(sources, fields=fields, shard_size=10)
    assert spans(planned) == [(0, -1, 0, 10), (0, -1, 10, 20), (0, -1, 20, 25), (2, -1, 0, 10)]
    assert planned.complete


def test_plan_ends_where_a_stream_begins(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x\nx\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x\n"))
    (tmp_path / "c.txt").write_bytes(b"x\n")
    planned = plan(tmp_path, shard_size=10)
    assert spans(planned) == [(0, -1, 0, 4)]
    assert (planned.complete, planned.num_sources) == (False, 1)
    assert plan(tmp_path, shard_size=10, limit=3).rows_left == 1
    assert plan(tmp_path, shard_size=10, limit=2).complete


def test_limit_ends_the_plan_after_its_last_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"1\n\n22\n   \n333\n4\n")
    (tmp_path / "b.txt").write_bytes(b"5\n6\n")
    assert spans(plan(tmp_path, shard_size=100, limit=1)) == [(0, -1, 0, 2)]
    assert spans(plan(tmp_path, shard_size=4, limit=2)) == [(0, -1, 0, 4), (0, -1, 4, 6)]
    assert spans(plan(tmp_path, shard_size=100, limit=4)) == [(0, -1, 0, 16)]
    assert spans(plan(tmp_path, shard_size=100, limit=5)) == [(0, -1, 0, 16), (1, -1, 0, 2)]
    assert spans(plan(tmp_path, shard_size=100, limit=99)) == [(0, -1, 0, 16), (1, -1, 0, 4)]


def test_header_is_no_row_of_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"id\ttext\n1\ta\n2\tb\n")
    assert spans(plan(tmp_path / "a.tsv", shard_size=100, limit=1)) == [(0, -1, 0, 12)]


def test_row_groups_are_cut_by_text_bytes_into_nearly_equal_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i:07}" + "x" * 993 for i in range(25)]
    blobs = [bytes([i]) * 5000 for i in range(25)]
    table = pa.table({"text": texts, "blob": blobs})
    # Statistics would put two more texts into each page's header.
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, compression="none", write_statistics=False)
    planned = plan(path, shard_size=4000)
    assert spans(planned) == [
        (0, 0, 0, 3),
        (0, 0, 3, 6),
        (0, 0, 6, 10),
        (0, 1, 0, 3),
        (0, 1, 3, 6),
        (0, 1, 6, 10),
        (0, 2, 0, 2),
        (0, 2, 2, 5),
    ]
    assert spans(plan(path, shard_size=4000, limit=14)) == [*spans(planned)[:4], (0, 1, 3, 4)]
    assert len(plan(path, shard_size=1).shards) == 25, "never a shard without rows"
    assert len(plan(path, shard_size=1 << 30).shards) == 3


def test_parquet_without_rows_has_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert plan(path, shard_size=10).shards == ()
    assert plan(path, shard_size=10).complete

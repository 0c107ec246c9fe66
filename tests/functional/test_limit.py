"""`--limit` that is reached before the last input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Completed
from tests.functional.test_bad_rows import read_ids

M3 = Callable[..., Completed]
ROWS = 8


def _write_input(path: Path) -> None:
    texts = [f"{path.name} row {number}" for number in range(ROWS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
        return
    lines = texts if path.suffix == ".txt" else [json.dumps({"text": text}) for text in texts]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("first", ["jsonl", "txt", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("second", ["jsonl", "txt", "parquet", "jsonl.gz"])
def test_a_limit_inside_the_first_file(m3_here: M3, tmp_path: Path, tiny_m3: Path, first: str, second: str) -> None:
    for name in (f"a.{first}", f"b.{second}"):
        _write_input(tmp_path / name)
    flags = (f"a.{first}", f"b.{second}", "--limit", 5, "--model", tiny_m3, "--outputs", "dense", "--out", "o.m3")
    planned = m3_here("plan", *flags, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["documents"] == 5
    done = m3_here("encode", *flags)
    assert done.returncode == 0, done.stderr
    ids = read_ids(tmp_path / "o.m3")
    assert len(ids) == 5
    assert {name.partition(":")[0] for name in ids} == {f"a.{first}"}

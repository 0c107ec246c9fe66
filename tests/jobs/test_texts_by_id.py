"""Texts are found by id in every format, the first of several, title and text joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3cli.errors import CorpusError, UsageError
from m3cli.jobs.rerank import TextSource

JSONL = (
    '{"_id": "1", "title": "T", "text": "one"}\n{"_id": 2, "text": "two"}\n{"_id": "2", "text": "later"}\n{"_id": "3'
)


def find(path: Path, *wanted: str, **fields: Any) -> dict[str, str]:
    return dict(TextSource(given=str(path), flag="--corpus", **fields).find_texts(wanted))


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(JSONL)
    assert find(path, "2", "1", "3") == {"1": "T\none", "2": "two"}
    assert find(path, "1", title_sep=" ") == {"1": "T one"}
    assert find(path, "1", title_field="") == {"1": "one"}
    assert find(path, "4") == {}


def test_tsv_of_topics_without_header(tmp_path: Path) -> None:
    path = tmp_path / "topics.tsv"
    path.write_text("12#0\twho?\n13#0\twhere?\n")
    assert find(path, "13#0") == {"13#0": "where?"}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"docid": ["a", "b"], "text": ["one", "two"]}), path)
    assert find(path, "b") == {"b": "two"}


def test_what_cannot_be_looked_up(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--corpus -: texts are looked up by id"):
        find(Path("-"), "a")
    (tmp_path / "c.jsonl").write_text('{"text": "no id"}\n')
    with pytest.raises(UsageError, match="no field that is known for ids"):
        find(tmp_path / "c.jsonl", "a")
    with pytest.raises(CorpusError, match="no such file"):
        find(tmp_path / "nowhere", "a")


def test_a_csv_file_is_refused_without_a_flag_that_nobody_has(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,text\na,b\n")
    with pytest.raises(CorpusError, match="CSV is not read") as caught:
        list(TextSource(given=str(tmp_path / "q.csv"), flag="--queries").find_texts({"a"}))
    assert "--input-format" not in str(caught.value)

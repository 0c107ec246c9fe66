"""A Lance dataset of `m3 export`, opened by LanceDB: every row, and the rankings of `m3 search`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporters.folders import write_folder
from tests.live import engines
from tests.live.test_engines import check_rows, compare, hostile
from tests.live.test_formats import export

pytestmark = pytest.mark.live


class Lance:
    """A table of LanceDB."""

    outputs = ("dense", "sparse", "colbert")

    def __init__(self, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lancedb = pytest.importorskip("lancedb", reason="lance is not tested live: lancedb not installed")
        self.table = lancedb.connect(str(out)).open_table(engines.NAME)

    def rows(self) -> dict[str, dict[str, Any]]:
        rows = self.table.to_arrow().to_pylist()
        for row in rows:
            weights = row["lexical_weights"]
            row["lexical_weights"] = dict(zip(weights["indices"], weights["values"], strict=True))
            row["colbert_vecs"] = np.array(row["colbert_vecs"], np.float32)
        assert len({row["key"] for row in rows}) == len(rows)
        return {row["key"]: row for row in rows}

    def rank(self, mode: str, query: dict[str, Any]) -> list[tuple[str, float]]:
        name = f"{mode}_vecs"
        found = self.table.search(query[name], vector_column_name=name).distance_type("dot").limit(10)
        hits = found.select(["key", "_distance"]).to_list()
        count = 1 if mode == "dense" else len(query[name])
        return [(hit["key"], (count - hit["_distance"]) / count) for hit in hits]


def test_every_row_is_equal(tmp_path: Path) -> None:
    pytest.importorskip("lance", reason="lance is not tested live: pylance not installed")
    folder = write_folder(tmp_path / "hostile.m3", [hostile()[:8], hostile()[8:]])
    out = export(folder, "lance", codes=(3,))
    lines = [json.loads(line) for line in (out / "left-out.jsonl").read_bytes().splitlines()]
    assert [line["key"] for line in lines] == ["twice"]
    check_rows(Lance(out), folder, lines)
    (out / "_export/folder.json").unlink()  # as after a kill between the dataset and its entry
    check_rows(Lance(export(folder, "lance", codes=(3,))), folder, lines)


def test_rankings_are_those_of_m3_search(
    tmp_path: Path, sample: Path, queries: Path, ranking: Callable[..., list[dict[str, float]]]
) -> None:
    pytest.importorskip("lance", reason="lance is not tested live: pylance not installed")
    (tmp_path / "sample.m3").symlink_to(sample)
    engine = Lance(export(tmp_path / "sample.m3", "lance"))
    asked = list(engines.read_rows(queries).values())
    for mode in ("dense", "colbert"):
        compare([engine.rank(mode, query) for query in asked], ranking(mode), mode)

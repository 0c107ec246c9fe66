"""Search on a CUDA device finds what it finds on the CPU; skips itself where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from m3cli.retrieval.scan import open_scan, scan_part
from m3cli.retrieval.scores import Ranked, TopRows
from tests.retrieval.test_scan import VOCABULARY, make_embeddings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("output", ["dense", "colbert"])
def test_cuda_finds_what_the_cpu_finds(output: Any) -> None:
    queries, passages = make_embeddings(1, 20), make_embeddings(2, 3000)
    found: list[Ranked] = []
    for device in ("cpu", "cuda"):
        top = TopRows(20, limit=50)
        scan = open_scan(output, queries, vocabulary=VOCABULARY, device=device)
        scan_part(scan, passages, top, rows=passages.rows, find_keys=lambda rows: rows, seen=0)
        found.append(top.finish())
    assert found[1].score == pytest.approx(found[0].score, abs=1e-4)
    same = np.mean([len(np.intersect1d(*(each.row[each.query == query] for each in found))) for query in range(20)])
    assert same > 49

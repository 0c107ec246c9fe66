#!/usr/bin/env python3
"""Search a collection that `m3 load` filled: dense, sparse, reciprocal ranks and MaxSim, as `m3 search` scores.

    m3 load corpus.m3 --to qdrant:http://localhost:6333 --name corpus
    echo 'my query' > query.txt && m3 encode query.txt --out query.m3
    search_qdrant.py http://localhost:6333 corpus query.m3

Queries are encoded by m3 with the checkpoint of the corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from qdrant_client import QdrantClient
from qdrant_client import models as m

CANDIDATES = 200


def main() -> None:
    """Search, and print the ten best keys of each way."""
    url, name, queries = sys.argv[1:]
    client = QdrantClient(url)
    for row in pq.read_table(Path(queries) / "rows").to_pylist():
        weights = row["lexical_weights"]
        dense = list(map(float, row["dense_vecs"]))
        sparse = m.SparseVector(indices=weights["indices"], values=weights["values"])
        colbert = np.frombuffer(row["colbert_vecs"], np.float16).reshape(-1, len(dense)).astype(float).tolist()
        lists = [
            m.Prefetch(query=dense, using="dense_vecs", limit=CANDIDATES),
            m.Prefetch(query=sparse, using="lexical_weights", limit=CANDIDATES),
        ]
        ways: dict[str, dict[str, Any]] = {
            "dense": {"query": dense, "using": "dense_vecs"},
            "sparse": {"query": sparse, "using": "lexical_weights"},
            # Qdrant's ranks count from 0, so that 61 makes the usual 1 / (60 + rank).
            "rrf": {"prefetch": lists, "query": m.RrfQuery(rrf=m.Rrf(k=61))},
            "maxsim": {"prefetch": lists, "query": colbert, "using": "colbert_vecs"},
        }
        for way, asked in ways.items():
            hits = client.query_points(name, limit=10, with_payload=["key"], **asked).points
            # MaxSim is a sum over the query's vectors; M3's score is their mean.
            divide = len(colbert) if way == "maxsim" else 1
            found = (f"{(hit.payload or {})['key']} {hit.score / divide:.4f}" for hit in hits)
            print(f"{row['id']} {way}: " + ", ".join(found))


if __name__ == "__main__":
    main()

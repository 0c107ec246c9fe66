#!/usr/bin/env python3
"""Search a collection that `m3 load` filled: dense, sparse, weighted and reciprocal ranks, as `m3 search` scores.

    m3 load corpus.m3 --to milvus:corpus.db --name corpus
    echo 'my query' > query.txt && m3 encode query.txt --out query.m3
    search_milvus.py corpus.db corpus query.m3

Queries are encoded by m3 with the checkpoint of the corpus. Milvus Lite has no ColBERT vectors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
from pymilvus import AnnSearchRequest, MilvusClient, RRFRanker, WeightedRanker

FIELDS = {"dense": "dense_vecs", "sparse": "lexical_weights"}
CANDIDATES = 200


def main() -> None:
    """Search, and print the ten best keys of each way."""
    uri, name, queries = sys.argv[1:]
    client = MilvusClient(uri)
    client.load_collection(name)
    for row in pq.read_table(Path(queries) / "rows").to_pylist():
        weights = dict(zip(row["lexical_weights"]["indices"], row["lexical_weights"]["values"], strict=True))
        data = {"dense": [list(map(float, row["dense_vecs"]))], "sparse": [weights]}
        asked = [
            AnnSearchRequest(data[mode], field, {"metric_type": "IP", "params": {"ef": CANDIDATES}}, limit=CANDIDATES)
            for mode, field in FIELDS.items()
        ]
        found = {
            mode: client.search(name, data[mode], anns_field=field, limit=10, output_fields=["key"])
            for mode, field in FIELDS.items()
        }
        # Without norm_score=False Milvus squashes scores by arctan; M3 adds them up as they are.
        rankers = {"weighted": WeightedRanker(0.5, 0.5, norm_score=False), "rrf": RRFRanker(60)}
        for mode, ranker in rankers.items():
            found[mode] = client.hybrid_search(name, asked, ranker, limit=10, output_fields=["key"])
        for mode, hits in found.items():
            print(f"{row['id']} {mode}: " + ", ".join(f"{hit['key']} {hit['distance']:.4f}" for hit in hits[0]))


if __name__ == "__main__":
    main()

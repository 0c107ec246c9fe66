#!/usr/bin/env python3
"""Search a table that `m3 load` filled: dense, sparse, weighted, reciprocal ranks and MaxSim, as `m3 search` scores.

    m3 load corpus.m3 --to pgvector:postgresql://localhost/mine --name corpus
    echo 'my query' > query.txt && m3 encode query.txt --out query.m3
    search_pgvector.py postgresql://localhost/mine corpus query.m3

Queries are encoded by m3 with the checkpoint of the corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psycopg
import pyarrow.parquet as pq

CANDIDATES = 200
# The first two are answered by the indexes: what is ordered by is the operator and nothing else.
LISTS = """
  dense AS (SELECT key, -(dense_vecs <#> %(dense)s) AS score FROM {table}
    ORDER BY dense_vecs <#> %(dense)s LIMIT {candidates}),
  sparse AS (SELECT key, -(lexical_weights <#> %(sparse)s) AS score FROM {table}
    WHERE nnz <= 1000 ORDER BY lexical_weights <#> %(sparse)s LIMIT {candidates}),
  found AS (SELECT key, -(dense_vecs <#> %(dense)s) AS d, -(lexical_weights <#> %(sparse)s) AS s, colbert_vecs
    FROM {table} WHERE key IN (SELECT key FROM dense UNION SELECT key FROM sparse)),
  ranks AS (SELECT key, 60 + rank() OVER (ORDER BY score DESC) AS rank FROM dense
    UNION ALL SELECT key, 60 + rank() OVER (ORDER BY score DESC) FROM sparse WHERE score > 0)
"""
WAYS = {
    "dense": "SELECT key, score FROM dense",
    "sparse": "SELECT key, score FROM sparse",
    "weighted": "SELECT key, (d + s) / 2 AS score FROM found",
    "rrf": "SELECT key, sum(1.0 / rank) AS score FROM ranks GROUP BY key",
    "maxsim": "SELECT key, m3_maxsim(%(colbert)s::halfvec[], colbert_vecs) AS score FROM found",
}


def main() -> None:
    """Search, and print the ten best keys of each way."""
    dsn, table, queries = sys.argv[1:]
    lists = LISTS.format(table=table, candidates=CANDIDATES)
    with psycopg.connect(dsn) as connection:
        for row in pq.read_table(Path(queries) / "rows").to_pylist():
            tokens = zip(row["lexical_weights"]["indices"], row["lexical_weights"]["values"], strict=True)
            vectors = np.frombuffer(row["colbert_vecs"], np.float16).reshape(-1, len(row["dense_vecs"])).astype(float)
            values = {
                "dense": str(list(map(float, row["dense_vecs"]))),
                "sparse": "{" + ",".join(f"{token + 1}:{weight}" for token, weight in tokens) + "}/250002",
                "colbert": [str(vector) for vector in vectors.tolist()],
            }
            for way, select in WAYS.items():
                hits = connection.execute(f"WITH {lists} {select} ORDER BY score DESC NULLS LAST LIMIT 10", values)
                print(f"{row['id']} {way}: " + ", ".join(f"{key} {score:.4f}" for key, score in hits))


if __name__ == "__main__":
    main()

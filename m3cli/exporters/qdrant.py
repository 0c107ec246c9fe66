"""Engine `qdrant`: rows into a running Qdrant, as JSON of its own interface.

A point's id is the UUIDv5 of the row's key; key, columns and fields are its payload. An output that a row does not
have (no weight, no ColBERT vector) is not sent.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from m3cli.errors import UsageError
from m3cli.exporters.milvus import check_schema
from m3cli.exporters.rows import (
    LeftOut,
    Part,
    Shape,
    Target,
    check_names,
    cut_matrices,
    decode_vectors,
    list_rows,
    widen,
)

MAX_MATRIX = 1_048_575
"numbers of a ColBERT matrix: the server wants fewer than 2^20"
BATCH_BYTES = 4 << 20
TIMEOUT = 120
"seconds"
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def make_id(key: str) -> str:
    """Return the id of a key's point."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, key))


def make_config(shape: Shape) -> dict[str, Any]:
    """Return the collection's vectors as Qdrant's interface has them: scores are sums of products, as M3's are."""
    narrow = {"dense": shape.dense_dtype == "float16", "colbert": shape.colbert_dtype == "float16"}
    plain: dict[str, dict[str, Any]] = {
        output: {"size": shape.dim, "distance": "Dot", "datatype": "float16" if narrow[output] else "float32"}
        for output in ("dense", "colbert")
    }
    vectors: dict[str, dict[str, Any]] = {}
    if "dense" in shape.outputs:
        vectors["dense_vecs"] = plain["dense"]
    if "colbert" in shape.outputs:
        # No graph: MaxSim ranks candidates again, and a graph of all token vectors would be many times the rest.
        extra: dict[str, Any] = {"multivector_config": {"comparator": "max_sim"}, "hnsw_config": {"m": 0}}
        vectors["colbert_vecs"] = {**plain["colbert"], **extra}
    return {"vectors": vectors, "sparse_vectors": {"lexical_weights": {}} if "sparse" in shape.outputs else {}}


def make_points(part: Part, shape: Shape, lost: LeftOut) -> list[bytes]:
    """Return rows as points; what Qdrant cannot hold is left out."""
    part = cut_matrices(part, MAX_MATRIX // shape.dim, lost)
    rows = list_rows(part, lost)
    embeddings = part.embeddings
    dense = None if embeddings.dense_vecs is None else widen(embeddings.dense_vecs)
    lexical, colbert = embeddings.lexical_weights, embeddings.colbert_vecs
    vectors = None if colbert is None else decode_vectors(colbert)
    points = []
    for place, (key, row) in enumerate(zip(part.keys.to_pylist(), rows, strict=True)):
        vector: dict[str, Any] = {}
        if dense is not None:
            vector["dense_vecs"] = dense[place]
        if lexical is not None and (span := _span(lexical.indptr, place)):
            vector["lexical_weights"] = {"indices": lexical.indices[span[0]], "values": lexical.values[span[0]]}
        if vectors is not None and colbert is not None and (span := _span(colbert.indptr, place)):
            vector["colbert_vecs"] = vectors[span[0]]
        point = {"id": make_id(key), "vector": vector, "payload": {"key": key, **row}}
        points.append(orjson.dumps(point, default=str, option=_OPTIONS))
    return points


def _span(indptr: Any, row: int) -> tuple[slice, ...]:
    """Return the slice of a row's items, in a tuple that is empty if there are none."""
    start, stop = int(indptr[row]), int(indptr[row + 1])
    return (slice(start, stop),) if stop > start else ()


def check(shape: Shape) -> None:
    """Check that kept fields can be in a payload."""
    if not shape.name or len(shape.name) > 255 or set(shape.name) & set('<>:"/\\|?*\0'):
        raise UsageError(f"--name {shape.name!r}: a collection's name has 1 to 255 characters, none of <>:\"/\\|?*")
    check_names(shape, ("key",), bool, "a Qdrant payload")


LIMITS = Target(outputs=("dense", "sparse", "colbert"), check=check)


def list_clients(_address: str) -> dict[str, str]:
    """Return the modules that are needed, and the packages that have them."""
    return {"qdrant_client": "qdrant-client"}


def find_limits(_address: str) -> Target:
    """Return what the engine can hold."""
    return LIMITS


class _Qdrant:
    """A collection of a running Qdrant; the key of its interface comes from $QDRANT_API_KEY."""

    batch_bytes = BATCH_BYTES
    number_bytes = 14.0
    weight_bytes = 24.0

    def __init__(self, url: str, shape: Shape) -> None:
        from qdrant_client import QdrantClient  # noqa: PLC0415

        self._shape = shape
        key = os.environ.get("QDRANT_API_KEY")
        self._client = QdrantClient(url=url, api_key=key, timeout=TIMEOUT, check_compatibility=False)

    def _request(self, method: str, path: str, body: bytes | None = None, **parameters: str) -> Any:
        return self._client.http.client.request(
            type_=Any,
            method=method,
            url=f"/collections/{{name}}{path}",
            path_params={"name": self._shape.name},
            params=parameters,
            headers={"Content-Type": "application/json"} if body else {},
            content=body,
        )["result"]

    def create(self) -> bool:
        config = make_config(self._shape)
        if not self._request("GET", "/exists")["exists"]:
            self._request("PUT", "", orjson.dumps(config))
            return True
        found = self._request("GET", "")["config"]["params"]
        check_schema(self._shape.name, _flatten(found), _flatten(config))
        return False

    def make_batch(self, part: Part, lost: LeftOut) -> list[bytes]:
        batches: list[list[bytes]] = [[]]
        size = 0
        for point in make_points(part, self._shape, lost):
            if batches[-1] and size + len(point) > BATCH_BYTES - 64:
                batches.append([])
                size = 0
            batches[-1].append(point)
            size += len(point) + 1
        return [b'{"points":[' + b",".join(points) + b"]}" for points in batches if points]

    def upsert(self, batch: list[bytes]) -> None:
        for body in batch:
            self._request("PUT", "/points", body, wait="true")

    def delete(self, keys: Sequence[str]) -> None:
        body = orjson.dumps({"points": [make_id(key) for key in keys]})
        self._request("POST", "/points/delete", body, wait="true")

    def finish(self) -> None:
        """Indexes are made by the server meanwhile."""

    def count(self) -> int:
        return int(self._request("POST", "/points/count", b'{"exact":true}')["count"])

    def close(self) -> None:
        self._client.close()


def connect(url: str, shape: Shape) -> Any:
    """Open a collection, table or index; `jobs.load.Engine` says what it can do."""
    return _Qdrant(url, shape)


def _flatten(config: dict[str, Any]) -> dict[str, str]:
    """Return what each vector of a collection is, in a word or two."""
    kinds = {
        name: " ".join(
            [f"{each['size']} numbers", each["distance"], *(["multivector"] if each.get("multivector_config") else [])]
        )
        for name, each in (config.get("vectors") or {}).items()
        if isinstance(each, dict)
    }
    return kinds | dict.fromkeys(config.get("sparse_vectors") or {}, "sparse")


def explain(error: Exception) -> tuple[bool, str] | None:
    """Tell of an error of the client whether it is worth another try, and its words."""
    from qdrant_client.common.client_exceptions import QdrantException  # noqa: PLC0415
    from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse  # noqa: PLC0415

    if isinstance(error, UnexpectedResponse):
        code = error.status_code or 0
        return code == 429 or code >= 500, f"{code} {error.content.decode(errors='replace')}"
    if isinstance(error, ResponseHandlingException):
        return True, str(error.source)
    if isinstance(error, QdrantException):  # the server asks for a pause
        return True, str(error)
    return (False, str(error)) if isinstance(error, ApiException) else None

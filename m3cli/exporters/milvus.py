"""Target and engine `milvus`: Parquet for its bulk import, and rows into a running Milvus or Milvus Lite.

Milvus Lite (a URI that is a file) has neither float16 nor arrays of structs: there dense vectors are float32, and
ColBERT vectors cannot be held.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from m3cli.errors import ForeignFolder, UsageError
from m3cli.exporters.parquet import list_vectors
from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    OpenFile,
    Part,
    Read,
    Shape,
    Target,
    check_names,
    cut_matrices,
    cut_part,
    cut_texts,
    decode_vectors,
    drop_long_keys,
    drop_rows,
    fill_template,
    kind_of,
    plain_columns,
    sparse_json,
)

COLLECTION_NAME = "collection.py"
MAX_TEXT = 65_535
"bytes of a VARCHAR"
MAX_VECTORS = 4_096
"elements of an array"
ROW_GROUP_BYTES = 4 << 20
_TYPES = {"text": "VARCHAR", "int": "INT64", "float": "DOUBLE", "bool": "BOOL"}
_ARROW = {"VARCHAR": pa.string(), "INT64": pa.int64(), "DOUBLE": pa.float64(), "BOOL": pa.bool_(), "INT32": pa.int32()}
_VECTORS = ("dense_vecs", "lexical_weights", "colbert_vecs")


def list_fields(shape: Shape) -> dict[str, str]:
    """Return the type of each field that is no vector."""
    kept = {field.name: _TYPES[kind_of(field.type)] for field in shape.kept}
    return {
        "key": "VARCHAR",
        "id": "VARCHAR",
        "chunk_index": "INT32",
        "char_start": "INT64",
        "char_end": "INT64",
    } | kept


def list_vector_fields(shape: Shape, *, lite: bool = False) -> dict[str, str]:
    """Return the type of each vector field."""
    kinds = {"dense": "FLOAT_VECTOR" if lite or shape.dense_dtype == "float32" else "FLOAT16_VECTOR"}
    kinds |= {"sparse": "SPARSE_FLOAT_VECTOR", "colbert": "ARRAY"}
    names = dict(zip(("dense", "sparse", "colbert"), _VECTORS, strict=True))
    return {names[output]: kinds[output] for output in shape.outputs}


def make_schema(fields: dict[str, str], vectors: dict[str, str], dim: int, max_capacity: int) -> Any:
    """Make the collection's schema."""
    from pymilvus import DataType, MilvusClient  # noqa: PLC0415

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    for name, kind in fields.items():
        length = {"max_length": 65535} if kind == "VARCHAR" else {}
        given = name in ("key", "id", "chunk_index", "char_start", "char_end")
        schema.add_field(name, DataType[kind], is_primary=name == "key", nullable=not given, **length)
    for name, kind in vectors.items():
        if kind == "ARRAY":
            struct = MilvusClient.create_struct_field_schema()
            struct.add_field("vec", DataType.FLOAT_VECTOR, dim=dim)
            schema.add_field(
                name, DataType.ARRAY, element_type=DataType.STRUCT, struct_schema=struct, max_capacity=max_capacity
            )
        else:
            schema.add_field(name, DataType[kind], **({} if kind.startswith("SPARSE") else {"dim": dim}))
    return schema


def make_indexes(vectors: dict[str, str]) -> Any:
    """Make the indexes: scores are sums of products, as M3's are."""
    from pymilvus import MilvusClient  # noqa: PLC0415

    indexes = MilvusClient.prepare_index_params()
    for name, kind in vectors.items():
        if kind == "ARRAY":
            indexes.add_index(f"{name}[vec]", index_type="HNSW", metric_type="MAX_SIM_IP")
        elif kind.startswith("SPARSE"):
            indexes.add_index(name, index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        else:
            indexes.add_index(name, index_type="AUTOINDEX", metric_type="IP")
    return indexes


def _fit(part: Part, lost: LeftOut) -> tuple[Part, Any]:
    """Return the rows that Milvus can hold, and their plain columns."""
    if part.embeddings.lexical_weights is not None:
        empty = np.flatnonzero(np.diff(part.embeddings.lexical_weights.indptr) == 0)
        part = drop_rows(part, empty, lost, "no lexical weights")
    part = cut_matrices(drop_long_keys(part, MAX_TEXT, lost), MAX_VECTORS, lost)
    return part, cut_texts(part, plain_columns(part, lost), MAX_TEXT, lost)


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:
    """Write a shard as one Parquet file for the bulk import."""
    schema = _arrow_schema(shape)
    with pq.ParquetWriter(open_file(".parquet"), schema, compression="zstd", use_dictionary=False) as writer:
        for part in read(None):
            for block in cut_part(part, ROW_GROUP_BYTES):
                table = _make_table(*_fit(block, lost), schema)
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
                del table
                pa.default_memory_pool().release_unused()  # or it grows with the number of shards, by a tenth


def _arrow_schema(shape: Shape) -> Any:
    columns = {name: _ARROW[kind] for name, kind in list_fields(shape).items()}
    kinds = {
        "FLOAT16_VECTOR": pa.list_(pa.uint8()),
        "FLOAT_VECTOR": pa.list_(pa.float32()),
        "SPARSE_FLOAT_VECTOR": pa.string(),
        "ARRAY": pa.list_(pa.struct([("vec", pa.list_(pa.float32()))])),
    }
    return pa.schema(columns | {name: kinds[kind] for name, kind in list_vector_fields(shape).items()})


def _make_table(part: Part, rows: Any, schema: Any) -> Any:
    embeddings = part.embeddings
    columns = [part.keys, *rows.columns]
    if (dense := embeddings.dense_vecs) is not None:
        columns.append(list_vectors(np.ascontiguousarray(dense).view(np.uint8) if dense.itemsize == 2 else dense))
    if embeddings.lexical_weights is not None:
        columns.append(pa.array(sparse_json(embeddings.lexical_weights), pa.string()))
    if (colbert := embeddings.colbert_vecs) is not None:
        structs = pa.StructArray.from_arrays([list_vectors(decode_vectors(colbert))], names=["vec"])
        columns.append(pa.ListArray.from_arrays(pa.array(colbert.indptr.astype(np.int32)), structs))
    return pa.table([column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def describe(shape: Shape) -> Mapping[str, bytes]:
    """Write the script that creates the collection and imports the parts, and the README."""
    most = max(1, min(shape.longest, MAX_VECTORS))
    script = fill_template(
        "milvus_collection.py.txt",
        name=shape.name,
        fields=list_fields(shape),
        vectors=list_vector_fields(shape),
        dim=shape.dim,
        most=most,
        functions="\n\n".join(
            re.sub(r"  # noqa.*", "", inspect.getsource(function)) for function in (make_schema, make_indexes)
        ),
    )
    return {COLLECTION_NAME: script, README_NAME: fill_template("milvus.md", name=shape.name)}


def check(shape: Shape) -> None:
    """Check that kept fields can be fields of a collection."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", shape.name):
        raise UsageError(f"--name {shape.name!r}: a collection's name has letters, digits and underscores only")
    check_names(shape, ("key", *_VECTORS), re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}").fullmatch, "a Milvus collection")


TARGET = Target(
    outputs=("dense", "sparse", "colbert"), write=write, describe=describe, check=check, number_bytes=4, weight_bytes=19
)


def list_clients(uri: str) -> dict[str, str]:
    """Return the modules that are needed, and the packages that have them."""
    return {"pymilvus": "pymilvus"} | ({"milvus_lite": "milvus-lite"} if _is_lite(uri) else {})


def find_limits(uri: str) -> Target:
    """Return what the engine at a URI can hold."""
    outputs: Any = ("dense", "sparse") if _is_lite(uri) else TARGET.outputs
    return Target(outputs=outputs, write=write, describe=describe, check=check)


def _is_lite(uri: str) -> bool:
    return "://" not in uri


class _Milvus:
    """A collection of a running Milvus, or of Milvus Lite."""

    batch_bytes = 32 << 20
    number_bytes = 4.0
    weight_bytes = 8.0

    def __init__(self, uri: str, shape: Shape) -> None:
        from pymilvus import MilvusClient  # noqa: PLC0415

        for name in ("pymilvus", "milvus_lite", "grpc"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log each error with its traceback
        self._shape = shape
        self._fields, self._vectors = list_fields(shape), list_vector_fields(shape, lite=_is_lite(uri))
        self._client = MilvusClient(uri)

    def create(self) -> bool:
        name = self._shape.name
        if not self._client.has_collection(name):
            schema = make_schema(self._fields, self._vectors, self._shape.dim, MAX_VECTORS)
            self._client.create_collection(name, schema=schema, index_params=make_indexes(self._vectors))
            return True
        described = self._client.describe_collection(name)
        found = {each["name"]: self._describe_field(each) for each in described["fields"]}
        found |= {each["name"]: ("ARRAY", None) for each in described.get("struct_array_fields", ())}
        dims = {
            name: None if kind in ("SPARSE_FLOAT_VECTOR", "ARRAY") else self._shape.dim
            for name, kind in self._vectors.items()
        }
        wanted = {name: (kind, dims.get(name)) for name, kind in (self._fields | self._vectors).items()}
        check_schema(name, found, wanted)
        self._client.load_collection(name)
        return False

    @staticmethod
    def _describe_field(field: Any) -> tuple[str, int | None]:
        dim = field["params"].get("dim")
        return field["type"].name, None if dim is None else int(dim)

    def make_batch(self, part: Part, lost: LeftOut) -> list[dict[str, Any]]:
        part, plain = _fit(part, lost)
        rows: list[dict[str, Any]] = plain.to_pylist()
        embeddings = part.embeddings
        dense = embeddings.dense_vecs
        if dense is not None and self._vectors["dense_vecs"] == "FLOAT_VECTOR":
            dense = dense.astype(np.float32)
        sparse = None if embeddings.lexical_weights is None else list(split_weights(embeddings.lexical_weights))
        matrices = None
        if (colbert := embeddings.colbert_vecs) is not None:
            matrices = np.split(decode_vectors(colbert), colbert.indptr[1:-1])
        for place, (row, key) in enumerate(zip(rows, part.keys.to_pylist(), strict=True)):
            row["key"] = key
            if dense is not None:
                row["dense_vecs"] = dense[place]
            if sparse is not None:
                row["lexical_weights"] = sparse[place]
            if matrices is not None:
                row["colbert_vecs"] = [{"vec": vector} for vector in matrices[place].tolist()]
        return rows

    def upsert(self, batch: list[dict[str, Any]]) -> None:
        if batch:
            self._client.upsert(self._shape.name, batch, retry_times=0)

    def delete(self, keys: Sequence[str]) -> None:
        words = ",".join(quote(key) for key in keys if len(key.encode()) <= MAX_TEXT)
        if words:
            self._client.delete(self._shape.name, filter=f"key in [{words}]")

    def finish(self) -> None:
        self._client.flush(self._shape.name)

    def count(self) -> int:
        name = self._shape.name
        found = self._client.query(name, output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def close(self) -> None:
        self._client.close()


def connect(uri: str, shape: Shape) -> Any:
    """Open a collection, table or index; `jobs.load.Engine` says what it can do."""
    return _Milvus(uri, shape)


def explain(error: Exception) -> tuple[bool, str] | None:
    """Tell of an error of pymilvus whether it is worth another try, and its words."""
    import grpc  # noqa: PLC0415
    from pymilvus.exceptions import MilvusException  # noqa: PLC0415

    if isinstance(error, grpc.RpcError):
        code = error.code()
        again = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return again or code == grpc.StatusCode.RESOURCE_EXHAUSTED, str(error.details())
    if isinstance(error, MilvusException):
        # 8: the server's rate limit; 2: no connection
        return error.code in (2, 8), str(error.message)
    return None


def check_schema(name: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Check that a collection has the fields that it is to have.

    Raises:
        ForeignFolder: one is missing, is another, or is not wanted.
    """
    for field in {**wanted, **found}:
        if found.get(field) != wanted.get(field):
            raise ForeignFolder(
                f"{name} has another schema: its field {field!r} is {_show(found.get(field))}, expected "
                f"{_show(wanted.get(field))}; use another --name, or remove it"
            )


def _show(kind: object) -> str:
    if isinstance(kind, tuple):
        return " ".join(str(each) for each in kind if each is not None)
    return "missing" if kind is None else str(kind)


def split_weights(lexical: Any) -> Any:
    """Yield the weights of each row, by token id."""
    indices, values, ends = lexical.indices.tolist(), lexical.values.tolist(), lexical.indptr.tolist()
    for start, stop in pairwise(ends):
        yield dict(zip(indices[start:stop], values[start:stop], strict=True))


def quote(text: str) -> str:
    """Return a text as a literal of Milvus' expressions."""
    for char, escape in (("\\", r"\\"), ('"', r"\""), ("\n", r"\n"), ("\r", r"\r"), ("\t", r"\t")):
        text = text.replace(char, escape)
    return f'"{text}"'

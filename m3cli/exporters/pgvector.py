"""Target and engine `pgvector`: PostgreSQL's binary COPY with SQL that creates the table, and rows into a database."""

from __future__ import annotations

import shlex
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from m3cli.errors import UsageError
from m3cli.exporters.milvus import check_schema
from m3cli.exporters.rows import (
    README_NAME,
    LeftOut,
    OpenFile,
    Part,
    Read,
    Shape,
    Target,
    change_texts,
    check_names,
    decode_vectors,
    drop_long_keys,
    drop_rows,
    fill_template,
    kind_of,
    plain_columns,
)

MAX_KEY = 2_600
"bytes; a B-tree holds a third of a page"
MAX_WEIGHTS = 16_000
"of a sparsevec"
MAX_INDEXED = 1_000
"weights that pgvector's HNSW index takes"
MAX_DIM = 16_000
"of a halfvec, or of a vector"
MAX_INDEXED_DIM = {"halfvec": 4_000, "vector": 2_000}
_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_END = struct.pack(">h", -1)
_NULL = struct.pack(">i", -1)
_TYPES = {"text": "text", "int": "bigint", "float": "double precision", "bool": "boolean"}
_FORMATS = {"integer": ">ii", "bigint": ">iq", "double precision": ">id", "boolean": ">i?"}
_SYSTEM_COLUMNS = ("tableoid", "xmin", "cmin", "xmax", "cmax", "ctid")
_ANY_TYPE = 16_384
"""In place of halfvec's number, which is another in each database: PostgreSQL 14 and newer takes any number that is not
one of its own types'."""


def list_columns(shape: Shape) -> dict[str, str]:
    """Return the type of each column."""
    columns = {"key": "text", "id": "text", "chunk_index": "integer", "char_start": "bigint", "char_end": "bigint"}
    columns |= {field.name: _TYPES[kind_of(field.type)] for field in shape.kept}
    if "dense" in shape.outputs:
        columns["dense_vecs"] = f"{_dense_type(shape)}({shape.dim})"
    if "sparse" in shape.outputs:
        columns |= {"lexical_weights": f"sparsevec({shape.vocabulary})", "nnz": "integer"}
    if "colbert" in shape.outputs:
        columns["colbert_vecs"] = f"halfvec({shape.dim})[]"
    return columns


def _dense_type(shape: Shape) -> str:
    return "vector" if shape.dense_dtype == "float32" else "halfvec"


def write(read: Read, open_file: OpenFile, shape: Shape, lost: LeftOut) -> None:
    """Write a shard as one file of binary COPY."""
    sink = open_file(".copy")
    sink.write(_HEADER)
    for part in read(None):
        sink.write(b"".join(make_tuples(part, shape, lost)))
    sink.write(_END)


def make_tuples(part: Part, shape: Shape, lost: LeftOut) -> list[bytes]:
    """Return rows as binary COPY has them; what PostgreSQL cannot hold is left out."""
    nul = np.flatnonzero(_has_nul(part.keys))
    part = drop_long_keys(drop_rows(part, nul, lost, "NUL in the key"), MAX_KEY, lost)
    words = ("NUL removed", "NUL in a text")
    rows = change_texts(part, plain_columns(part, lost), _has_nul, lambda text: text.replace("\0", ""), lost, words)
    kinds = list_columns(shape)
    texts = [_field(key.encode()) for key in part.keys.to_pylist()]
    columns = [texts, *(_encode(rows.column(name).to_pylist(), kinds[name]) for name in rows.column_names)]
    embeddings = part.embeddings
    if (dense := embeddings.dense_vecs) is not None:
        kind = ">f4" if shape.dense_dtype == "float32" else ">f2"
        head = struct.pack(">ihh", 4 + np.dtype(kind).itemsize * shape.dim, shape.dim, 0)
        columns.append([head + vector for vector in _split(dense, kind, np.arange(len(dense) + 1))])
    if (lexical := embeddings.lexical_weights) is not None:
        columns += _encode_weights(part, lexical, shape.vocabulary, lost)
    if (colbert := embeddings.colbert_vecs) is not None:
        columns.append(_encode_matrices(decode_vectors(colbert, np.float16), colbert.indptr))
    count = struct.pack(">h", len(kinds))
    return [count + b"".join(fields) for fields in zip(*columns, strict=True)]


def _has_nul(column: Any) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.fill_null(pc.match_substring(column, "\0"), fill_value=False).to_numpy(False)
    return found


def _field(value: bytes) -> bytes:
    return struct.pack(">i", len(value)) + value


def _encode(values: list[Any], kind: str) -> list[bytes]:
    if kind == "text":
        return [_NULL if value is None else _field(value.encode()) for value in values]
    form = struct.Struct(_FORMATS[kind])
    length = form.size - 4
    return [_NULL if value is None else form.pack(length, value) for value in values]


def _split(values: NDArray[Any], kind: str, ends: NDArray[np.int64]) -> list[bytes]:
    """Return the bytes, in a type of numpy's, of consecutive slices of the first axis."""
    raw = np.ascontiguousarray(values, kind).tobytes()
    size = np.dtype(kind).itemsize * (values.shape[1] if values.ndim == 2 else 1)
    return [raw[start:stop] for start, stop in pairwise((ends * size).tolist())]


def _encode_weights(part: Part, lexical: Any, dim: int, lost: LeftOut) -> list[list[bytes]]:
    indices = _split(lexical.indices, ">i4", lexical.indptr)
    values = _split(lexical.values, ">f4", lexical.indptr)
    vectors, counts = [], []
    for row, (tokens, weights) in enumerate(zip(indices, values, strict=True)):
        count = len(tokens) // 4
        if count > MAX_WEIGHTS:
            why = f"more than {MAX_WEIGHTS:,} weights"
            lost.field(part.keys[row].as_py(), "lexical_weights", "field left out", why)
            vectors.append(_NULL)
        else:
            vectors.append(struct.pack(">iiii", 12 + 8 * count, dim, count, 0) + tokens + weights)
        counts.append(struct.pack(">ii", 4, count))
    return [vectors, counts]


def _encode_matrices(vectors: NDArray[np.float16], indptr: NDArray[np.int64]) -> list[bytes]:
    count, dim = vectors.shape
    framed = np.zeros(count, [("length", ">i4"), ("dim", ">i2"), ("unused", ">i2"), ("numbers", ">f2", (dim,))])
    framed["length"], framed["dim"], framed["numbers"] = 4 + 2 * dim, dim, vectors
    raw, size = framed.tobytes(), framed.dtype.itemsize
    arrays = []
    for start, stop in pairwise(indptr.tolist()):
        if start == stop:
            arrays.append(_field(struct.pack(">iiI", 0, 0, _ANY_TYPE)))
        else:
            head = struct.pack(">iiIii", 1, 0, _ANY_TYPE, stop - start, 1)
            arrays.append(_field(head + raw[start * size : stop * size]))
    return arrays


def make_table_sql(shape: Shape) -> str:
    """Return the statements that create the table and the function for MaxSim."""
    columns = list_columns(shape)
    given = ("id", "chunk_index", "char_start", "char_end")
    lines = [f"  {quote(name)} {kind}" + (" NOT NULL" if name in given else "") for name, kind in columns.items()]
    lines[0] += " PRIMARY KEY"
    table = f"CREATE TABLE {quote(shape.name)} (\n" + ",\n".join(lines) + "\n);\n"
    return "CREATE EXTENSION IF NOT EXISTS vector;\n" + table + (_MAXSIM if "colbert" in shape.outputs else "")


_MAXSIM = """\
CREATE OR REPLACE FUNCTION m3_maxsim(query halfvec[], vectors halfvec[]) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT avg(best) FROM (
    SELECT max(-(q <#> v)) AS best FROM unnest(query) WITH ORDINALITY AS a(q, n), unnest(vectors) AS b(v) GROUP BY n
  ) AS each_vector_of_the_query
$$;
"""


def make_copy_sql(shape: Shape, table: str) -> str:
    """Return the statement that reads binary COPY; columns are named, as those of a table may be in another order."""
    return f"COPY {table} ({', '.join(map(quote, list_columns(shape)))}) FROM STDIN (FORMAT binary)"


def make_index_sql(shape: Shape) -> str:
    """Return the statements that create the indexes, once the rows are there."""
    kind, wanted = _dense_type(shape), []
    if "dense" in shape.outputs and shape.dim <= MAX_INDEXED_DIM[kind]:
        wanted.append(("dense", f"dense_vecs {kind}_ip_ops", ""))
    if "sparse" in shape.outputs:
        wanted.append(("sparse", "lexical_weights sparsevec_ip_ops", f" WHERE nnz <= {MAX_INDEXED}"))
    return "".join(
        f"CREATE INDEX IF NOT EXISTS {quote(f'{shape.name}_{output}')} ON {quote(shape.name)} "
        f"USING hnsw ({column}){condition};\n"
        for output, column, condition in wanted
    )


def describe(shape: Shape) -> Mapping[str, bytes]:
    """Write the SQL and the README."""
    values = {"kind": _dense_type(shape), "dim": shape.dim, "vocabulary": shape.vocabulary, "most": MAX_INDEXED}
    table = quote(shape.name)
    copy = shlex.quote(make_copy_sql(shape, table))
    readme = fill_template("pgvector.md", table=table, copy=copy, **values)
    sql = {"table.sql": make_table_sql(shape), "indexes.sql": make_index_sql(shape)}
    return {README_NAME: readme, **{name: text.encode() for name, text in sql.items()}}


def check(shape: Shape) -> None:
    """Check that kept fields can be columns."""
    if shape.dim > MAX_DIM:
        raise UsageError(f"{shape.dim} numbers a vector: pgvector holds at most {MAX_DIM:,}; use another target")
    if not 0 < len(shape.name.encode()) <= 50:
        raise UsageError(f"--name {shape.name!r}: a table's name has 1 to 50 bytes")
    taken = ("key", "nnz", "dense_vecs", "lexical_weights", "colbert_vecs", *_SYSTEM_COLUMNS)
    check_names(shape, taken, lambda name: 0 < len(name.encode()) < 64 and "\0" not in name, "a PostgreSQL table")


def quote(name: str) -> str:
    """Return a name as SQL takes it, its own words too."""
    return '"' + name.replace('"', '""') + '"'


TARGET = Target(
    outputs=("dense", "sparse", "colbert"), write=write, describe=describe, check=check, number_bytes=2, weight_bytes=8
)


def list_clients(_address: str) -> dict[str, str]:
    """Return the modules that are needed, and the packages that have them."""
    return {"psycopg": "psycopg[binary]"}


def find_limits(_address: str) -> Target:
    """Return what the engine can hold."""
    return TARGET


class _Pgvector:
    """A table of a PostgreSQL database."""

    batch_bytes = 32 << 20
    number_bytes = 2.0
    weight_bytes = 8.0

    def __init__(self, dsn: str, shape: Shape) -> None:
        import psycopg  # noqa: PLC0415

        self._shape, self._table = shape, quote(shape.name)
        self._connect: Any = lambda: psycopg.connect(dsn, connect_timeout=30)
        self._connection: Any = self._connect()

    def _open(self) -> Any:
        if self._connection.closed:
            self._connection = self._connect()
        self._connection.rollback()
        return self._connection

    @contextmanager
    def _alone(self, lock: str) -> Iterator[Any]:
        """Open a transaction that waits for others of m3 with the same lock; IF NOT EXISTS alone does not."""
        connection = self._open()
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (lock,))
            yield connection

    def create(self) -> bool:
        with self._alone("m3 load") as connection:  # of any table: all have one extension and one function
            columns = connection.execute(
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
                "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
                (self._table,),
            )
            found = dict(columns.fetchall())
            if not found:
                connection.execute(make_table_sql(self._shape))
                return True
        check_schema(self._shape.name, found, list_columns(self._shape))
        return False

    def make_batch(self, part: Part, lost: LeftOut) -> bytes:
        rows = make_tuples(part, self._shape, lost)
        return b"".join((_HEADER, *rows, _END)) if rows else b""

    def upsert(self, batch: bytes) -> None:
        if not batch:
            return
        names = [quote(name) for name in list_columns(self._shape)]
        changed = ", ".join(f"{name} = excluded.{name}" for name in names[1:])
        connection = self._open()
        with connection.transaction():
            connection.execute(f"CREATE TEMPORARY TABLE m3_incoming (LIKE {self._table}) ON COMMIT DROP")
            with connection.cursor().copy(make_copy_sql(self._shape, "m3_incoming")) as copy:
                copy.write(batch)
            connection.execute(
                f"INSERT INTO {self._table} SELECT * FROM m3_incoming ON CONFLICT (key) DO UPDATE SET {changed}"  # noqa: S608
            )

    def delete(self, keys: Sequence[str]) -> None:
        held = [key for key in keys if "\0" not in key]
        connection, table = self._open(), self._table.replace("%", "%%")
        with connection.transaction():
            connection.execute(f"DELETE FROM {table} WHERE key = ANY(%s)", (held,))  # noqa: S608

    def finish(self) -> None:
        with self._alone(f"m3 load {self._table}") as connection:
            connection.execute(make_index_sql(self._shape) or "SELECT")

    def count(self) -> int:
        connection = self._open()
        with connection.transaction():
            return int(connection.execute(f"SELECT count(*) FROM {self._table}").fetchone()[0])  # noqa: S608

    def close(self) -> None:
        self._connection.close()


def connect(dsn: str, shape: Shape) -> Any:
    """Open a collection, table or index; `jobs.load.Engine` says what it can do."""
    return _Pgvector(dsn, shape)


def explain(error: Exception) -> tuple[bool, str] | None:
    """Tell of an error of psycopg whether it is worth another try, and its words."""
    import psycopg  # noqa: PLC0415

    if not isinstance(error, psycopg.Error):
        return None
    words, state = str(error), error.sqlstate
    if state is None:  # libpq's own errors have no code
        return any(word in words for word in ("refused", "timeout", "timed out", "closed", "lost", "reset")), words
    return state[:2] in ("08", "40", "53", "57"), words  # connection, conflict, resources, shutdown

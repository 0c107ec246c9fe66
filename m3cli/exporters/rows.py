"""Rows on their way out of a folder: their keys, how they are cut into blocks, and what a target cannot hold.

An exporter gets parts of a folder (`Part`) and writes files, or sends batches to an engine. What it cannot write as it
is goes to `LeftOut`, row by row or field by field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from m3cli.errors import UNREADABLE_DATE, UsageError
from m3cli.records import Embeddings, LexicalWeights, Output, TokenMatrices

Rows = NDArray[np.int64]

KEY_COLUMNS = ("id", "chunk_index", "num_chunks")
"what a row's key is made of"
PLAIN_COLUMNS = ("id", "chunk_index", "char_start", "char_end")
"columns that every target has, before the kept fields"
README_NAME = "README.md"


class Sink(Protocol):
    """An open file."""

    def write(self, data: bytes | memoryview, /) -> Any:
        """Append bytes."""

    def overwrite_start(self, data: bytes, /) -> None:
        """Replace the file's first bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some rows of a shard, in order; R rows."""

    shard: int
    keys: Any
    "pyarrow.Array of R strings"
    rows: Any
    "pyarrow.Table: PLAIN_COLUMNS, then the chosen kept fields and text"
    embeddings: Embeddings
    "of the chosen outputs; ColBERT vectors have a scale where they are int8"

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all parts of an export have in common."""

    name: str
    "of the collection, table or index"
    outputs: tuple[Output, ...]
    dim: int
    "D, width of dense and ColBERT vectors"
    vocabulary: int
    columns: Any
    "pyarrow.Schema of Part.rows"
    dense_dtype: str
    "float16 or float32"
    colbert_dtype: str
    "float16, int8 or binary, as the folder has it"
    rows: int
    "of the folder, less those whose key an earlier one has"
    longest: int = 0
    "vectors of the row with most of them; 0 until all rows have been read"

    @property
    def kept(self) -> list[Any]:
        """Arrow fields of the kept fields and the text."""
        return [field for field in self.columns if field.name not in PLAIN_COLUMNS]


class LeftOut:
    """Rows and fields that a target cannot hold: written down one by one, and counted by reason."""

    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self._write = write

    def row(self, key: str, why: str) -> None:
        """Note a row that is not written."""
        self.rows += 1
        self._note(key, None, "row left out", why)

    def field(self, key: str, field: str, done: str, why: str) -> None:
        """Note a field that is written in another way, or not at all."""
        self._note(key, field, done, why)

    def _note(self, key: str, field: str | None, done: str, why: str) -> None:
        self.reasons[f"{done.partition(' to ')[0]}: {why}"] += 1
        line = {"key": key, "field": field, "done": done, "why": why}
        self._write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


Read = Callable[[Sequence[Output] | None], Iterator[Part]]
"reads the parts of a shard (or of the folder, for a target of one file) with these outputs; None: the chosen ones"
OpenFile = Callable[[str], Sink]
"opens a file by what follows the shard's name, such as '.parquet'; or by its name, for a target of one file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the job must know of a target."""

    outputs: tuple[Output, ...]
    "that it can hold"
    write: Callable[[Read, OpenFile, Shape, LeftOut], None] | None = None
    "None: rows are sent to a running engine only"
    write_folder: Callable[[Read, Path, Shape, LeftOut], None] | None = None
    "in place of `write`: writes all rows into a new folder, which is named after the shape and `folder_ending`"
    folder_ending: str = ""
    describe: Callable[[Shape], Mapping[str, bytes]] = lambda _: {}
    "writes the schema, mapping or collection file and the README, by name"
    check: Callable[[Shape], None] | None = None
    "raises UsageError for a shape that it cannot hold"
    whole: bool = False
    "one file for the folder, not one for each shard"
    binary: bool = False
    "takes ColBERT vectors of a bit a number"
    number_bytes: float = 2.0
    "of a dense or ColBERT number, about"
    weight_bytes: float = 8.0
    "of a lexical weight with its token, about"


def fill_template(template: str, /, **values: object) -> bytes:
    """Return a file of an export from its template."""
    return (
        Path(__file__).with_name("templates").joinpath(template).read_text(encoding="utf-8").format(**values).encode()
    )


def make_keys(rows: Any) -> Any:
    """Return the keys [R]: `id`, or `id#chunk_index` for the rows of a document of several."""
    ids, index, number = (rows.column(name).combine_chunks() for name in KEY_COLUMNS)
    ids = ids.cast(pa.large_string())
    several = pc.greater(number, 1)
    if not pc.any(several).as_py():
        return ids
    return pc.if_else(
        several, pc.binary_join_element_wise(ids, index.cast(pa.large_string()), pa.scalar("#", pa.large_string())), ids
    )


def list_keys(rows: Any) -> list[str]:
    """Return the keys as strings."""
    keys: list[str] = make_keys(rows).to_pylist()
    return keys


def hash_keys(rows: Any) -> NDArray[np.uint64]:
    """Hash keys to 64 bits."""
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(key.encode()) for key in list_keys(rows)), np.uint64, rows.num_rows)


def make_part(shard: int, rows: Any, embeddings: Embeddings, *, columns: Sequence[str]) -> Part:
    """Make a part of a folder's rows, with some of their columns."""
    return Part(shard=shard, keys=make_keys(rows), rows=rows.select(list(columns)), embeddings=embeddings)


def drop_rows(part: Part, dropped: Rows, lost: LeftOut | None, why: str) -> Part:
    """Return a part without some rows, ascending."""
    if not len(dropped):
        return part
    if lost is not None:
        for key in part.keys.take(pa.array(dropped)).to_pylist():
            lost.row(key, why)
    return pick(part, np.setdiff1d(np.arange(part.num_rows), dropped))


def pick(part: Part, rows: Rows | slice) -> Part:
    """Return some rows of a part; a slice copies no vectors."""
    embeddings = part.embeddings
    dense, lexical, colbert = embeddings.dense_vecs, embeddings.lexical_weights, embeddings.colbert_vecs
    if lexical is not None:
        items, indptr = _find_items(lexical.indptr, rows)
        lexical = LexicalWeights(indptr=indptr, indices=lexical.indices[items], values=lexical.values[items])
    if colbert is not None:
        items, indptr = _find_items(colbert.indptr, rows)
        scales = None if colbert.scales is None else colbert.scales[items]
        colbert = TokenMatrices(indptr=indptr, vectors=colbert.vectors[items], scales=scales)
    if isinstance(rows, slice):
        keys, table = (each.slice(rows.start, rows.stop - rows.start) for each in (part.keys, part.rows))
    else:
        keys, table = (each.take(pa.array(rows)) for each in (part.keys, part.rows))
    picked = Embeddings(
        rows=embeddings.rows[rows],
        dense_vecs=None if dense is None else dense[rows],
        lexical_weights=lexical,
        colbert_vecs=colbert,
    )
    return replace(part, keys=keys, rows=table, embeddings=picked)


def _find_items(indptr: Rows, rows: Rows | slice) -> tuple[Rows | slice, Rows]:
    """Return the places of the items of some rows, and where those rows begin among them."""
    if isinstance(rows, slice):
        new = indptr[rows.start : rows.stop + 1]
        return slice(new[0], new[-1]), new - new[0]
    lengths = np.diff(indptr)[rows]
    new = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(new[-1]) + np.repeat(indptr[rows] - new[:-1], lengths), new


def cut_part(part: Part, most: float, *, number: float = 2.0, weight: float = 8.0) -> Iterator[Part]:
    """Cut a part into blocks of at most `most` bytes, a number and a weight having so many; a larger row is a block."""
    ends = np.cumsum(count_bytes(part, number=number, weight=weight))
    start = 0
    while start < part.num_rows:
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield pick(part, slice(start, stop))
        start = stop


def count_bytes(part: Part, *, number: float, weight: float) -> NDArray[np.float64]:
    """Return about how many bytes each row takes [R]."""
    embeddings = part.embeddings
    sizes = np.full(part.num_rows, 64.0)
    for column in (part.keys, *(part.rows.column(name) for name in part.rows.column_names)):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            sizes += pc.binary_length(column).fill_null(0).to_numpy()
        elif pa.types.is_nested(column.type):
            sizes += 16 * column.nbytes / max(1, part.num_rows)
        else:
            sizes += 8
    if embeddings.dense_vecs is not None:
        sizes += embeddings.dense_vecs.shape[1] * number
    if embeddings.lexical_weights is not None:
        sizes += np.diff(embeddings.lexical_weights.indptr) * weight
    if embeddings.colbert_vecs is not None:
        sizes += np.diff(embeddings.colbert_vecs.indptr) * (embeddings.colbert_vecs.vectors.shape[1] * number)
    return sizes


def widen(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return vectors as float32, row after row."""
    return np.ascontiguousarray(vectors, np.float32)


def decode_vectors(colbert: TokenMatrices, dtype: Any = np.float32) -> NDArray[Any]:
    """Return ColBERT vectors [V, D] as numbers: int8 times its scale, float16 as it is."""
    if colbert.scales is None:
        return np.ascontiguousarray(colbert.vectors, dtype)
    return np.ascontiguousarray(colbert.vectors * colbert.scales[:, None], dtype)


def cut_matrices(part: Part, most: int, lost: LeftOut) -> Part:
    """Cut rows of more than `most` ColBERT vectors to their first ones."""
    colbert = part.embeddings.colbert_vecs
    if colbert is None or not (long := np.flatnonzero(np.diff(colbert.indptr) > most)).size:
        return part
    for row in long.tolist():
        lost.field(part.keys[row].as_py(), "colbert_vecs", f"cut to {most:,} vectors", f"more than {most:,} vectors")
    lengths = np.minimum(np.diff(colbert.indptr), most)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    items = np.arange(indptr[-1]) + np.repeat(colbert.indptr[:-1] - indptr[:-1], lengths)
    scales = None if colbert.scales is None else colbert.scales[items]
    matrices = TokenMatrices(indptr=indptr, vectors=colbert.vectors[items], scales=scales)
    return replace(part, embeddings=replace(part.embeddings, colbert_vecs=matrices))


_TOKENS: list[bytes] = []


def sparse_json(lexical: LexicalWeights) -> list[bytes]:
    """Return each row's weights as a JSON object, token ids as its names."""
    most = int(lexical.indices.max(initial=0)) + 1
    _TOKENS.extend(b',"%d":' % token for token in range(len(_TOKENS), most))
    pieces: list[bytes] = [b""] * (2 * len(lexical.indices))
    if pieces:
        pieces[::2] = map(_TOKENS.__getitem__, lexical.indices.tolist())
        pieces[1::2] = orjson.dumps(lexical.values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    ends = (2 * lexical.indptr).tolist()
    return [b"{" + b"".join(pieces[start:stop])[1:] + b"}" for start, stop in pairwise(ends)]


def is_plain(kind: Any) -> bool:
    """Whether a type of Arrow is one that every engine has: text, a flag, an integer of 64 bits, a float."""
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    integer = pa.types.is_integer(kind) and not pa.types.is_uint64(kind)
    return bool(text or pa.types.is_boolean(kind) or integer or pa.types.is_floating(kind))


def plain_columns(part: Part, lost: LeftOut) -> Any:
    """Return a part's rows as text, int64, float64 and bool: what is none of them becomes its JSON text."""
    columns = {}
    for name in part.rows.column_names:
        column = part.rows.column(name).combine_chunks()
        kind = column.type
        if not is_plain(kind):
            values = list_column(part, name, column, lost)
            texts = [None if value is None else orjson.dumps(value, default=str).decode() for value in values]
            columns[name] = pa.array(texts, pa.large_string())
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns[name] = column.cast(pa.large_string())
        elif pa.types.is_floating(kind):
            columns[name] = column.cast(pa.float64())
        else:
            columns[name] = column if pa.types.is_boolean(kind) else column.cast(pa.int64())
    return pa.table(columns)


def kind_of(kind: Any) -> str:
    """Return text, bool, int or float: what a column becomes in `plain_columns`."""
    if pa.types.is_boolean(kind):
        return "bool"
    if is_plain(kind) and pa.types.is_integer(kind):
        return "int"
    return "float" if is_plain(kind) and pa.types.is_floating(kind) else "text"


def list_values(column: Any, note: Callable[[int], object]) -> list[Any]:
    """Return a column's values in Python, None for a date or time that Python cannot represent.

    Such are years outside 1 to 9999, and time zones that this machine does not know.

    Args:
        column: an array of Arrow.
        note: called with the row of each such value.
    """
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UNREADABLE_DATE:
        pass
    values = []
    for row, value in enumerate(column):
        try:
            values.append(value.as_py())
        except UNREADABLE_DATE:  # noqa: PERF203  only where the quick way failed
            note(row)
            values.append(None)
    return values


def list_column(part: Part, name: str, column: Any, lost: LeftOut) -> list[Any]:
    """Return the values of a column of a part's rows; those that Python cannot represent are left out."""
    why = "a date or time that Python cannot represent"
    return list_values(column, lambda row: lost.field(part.keys[row].as_py(), name, "field left out", why))


def list_rows(part: Part, lost: LeftOut) -> list[dict[str, Any]]:
    """Return a part's rows for JSON, by column; what JSON or Python cannot represent is left out."""
    rows = drop_infinite(part, part.rows, lost)
    columns = [list_column(part, name, rows.column(name), lost) for name in rows.column_names]
    return [dict(zip(rows.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def drop_infinite(part: Part, rows: Any, lost: LeftOut) -> Any:
    """Replace NaN and infinity in plain columns by null: JSON has no word for them."""
    for place, name in enumerate(rows.column_names):
        column = rows.column(name)
        if not pa.types.is_floating(column.type):
            continue
        bad = pc.fill_null(pc.invert(pc.is_finite(column.cast(pa.float64()))), fill_value=False)
        for row in np.flatnonzero(bad.to_numpy()).tolist():
            lost.field(part.keys[row].as_py(), name, "field left out", "not a finite number")
        rows = rows.set_column(place, name, pc.if_else(bad, None, column))
    return rows


def check_names(shape: Shape, taken: Sequence[str], is_name: Callable[[str], object], what: str) -> None:
    """Check that kept fields can be columns.

    Raises:
        UsageError: a name is that of one of our columns, or one that the target does not take.
    """
    for field in shape.kept:
        if field.name in taken:
            raise UsageError(
                f"the kept field {field.name!r} has the name of a column of {what}; leave it out with --fields"
            )
        if not is_name(field.name):
            raise UsageError(f"the kept field {field.name!r} cannot be a field of {what}; leave it out with --fields")


def drop_long_keys(part: Part, most: int, lost: LeftOut) -> Part:
    """Leave out the rows whose key has more than `most` bytes of UTF-8."""
    return drop_rows(part, np.flatnonzero(text_bytes(part.keys) > most), lost, f"key over {most:,} bytes")


def text_bytes(column: Any) -> NDArray[np.int64]:
    """Return the bytes of each text [R], 0 for null."""
    lengths: NDArray[np.int64] = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return lengths


def change_texts(
    part: Part,
    rows: Any,
    bad: Callable[[Any], Any],
    change: Callable[[str], str],
    lost: LeftOut,
    words: tuple[str, str],
) -> Any:
    """Change the texts in plain columns that are `bad`; `words` are what is done, and why."""
    for place, name in enumerate(rows.column_names):
        column = rows.column(name)
        if not pa.types.is_large_string(column.type):
            continue
        found = np.flatnonzero(np.asarray(bad(column)))
        if not len(found):
            continue
        texts = column.to_pylist()
        for row in found.tolist():
            texts[row] = change(texts[row])
            lost.field(part.keys[row].as_py(), name, *words)
        rows = rows.set_column(place, name, pa.array(texts, pa.large_string()))
    return rows


def cut_texts(part: Part, rows: Any, most: int, lost: LeftOut) -> Any:
    """Cut texts of more than `most` bytes of UTF-8, between two characters."""
    return change_texts(
        part,
        rows,
        lambda column: text_bytes(column) > most,
        lambda text: text.encode()[:most].decode(errors="ignore"),
        lost,
        (f"cut to {most:,} bytes", f"text over {most:,} bytes"),
    )


TARGETS = {
    "parquet": "parquet",
    "npy": "npy",
    "faiss": "faiss",
    "milvus": "milvus",
    "pgvector": "pgvector",
    "lance": "lance",
    "elasticsearch": "elasticsearch",
    "opensearch": "elasticsearch",
    "vespa": "vespa",
}
"module of each target of m3 export"
ENGINES = ("milvus", "pgvector", "qdrant")
"of m3 load, and their modules"


def find_target(name: str) -> Target:
    """Return a target.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"--to {name!r}: expected one of {', '.join(TARGETS)}")
    module: Any = import_module(f"m3cli.exporters.{TARGETS[name]}")
    targets: dict[str, Target] = getattr(module, "TARGETS", {})
    found: Target = targets[name] if targets else module.TARGET
    return found


def find_engine(to: str) -> tuple[str, str, Any]:
    """Return name and address of an engine, from NAME:ADDRESS, and its module.

    Raises:
        UsageError: there is none of that name, or its client is not installed.
    """
    name, colon, address = to.partition(":")
    if name not in ENGINES or not address:
        known = ", ".join(f"{engine}:ADDRESS" for engine in ENGINES)
        raise UsageError(f"--to {name}{colon}...: expected {known}")
    module: Any = import_module(f"m3cli.exporters.{name}")
    missing = [package for client, package in module.list_clients(address).items() if find_spec(client) is None]
    if missing:
        raise UsageError(f"--to {name}: {missing[0]} is not installed; pip install '{missing[0]}'")
    return name, address, module

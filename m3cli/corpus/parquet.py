"""Rows of a Parquet or Arrow file: columns and fields of structs, one row group at a time, a few MiB decoded at once.

Arrow files (Feather, and those of datasets.save_to_disk) are read as one row group.

Text, title and id may have any of Arrow's string types (string, large_string, string_view, dictionaries of them); an id
may be an integer. A null is an error of its row, another type one of the file. Kept columns remain Arrow values; views,
which pyarrow's `take` does not support, become large strings and large binaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pyarrow import ipc

from m3cli.config import ENCODE_FLAGS, FieldFlags
from m3cli.corpus.remote import RemoteFile, is_remote
from m3cli.corpus.rows import INVALID_UTF8, TOO_LONG, Fault, RawRow
from m3cli.corpus.streams import corpus_errors
from m3cli.errors import UNREADABLE_DATE, CorpusError, first_line
from m3cli.paths import close_read
from m3cli.records import Fields, Source

BATCH_BYTES = 4 << 20
"of text, decoded at once"
MAX_BATCH_ROWS = 1 << 16
BYTES_OF = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


@contextmanager
def parquet_errors(source: Source) -> Iterator[None]:
    """Turn errors of reading Parquet and Arrow into a CorpusError that names the source and a remedy."""
    try:
        with corpus_errors(source):
            yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        kind = "Arrow" if source.format == "arrow" else "Parquet"
        raise CorpusError(
            f"{source.name} is corrupt, or not {kind} that pyarrow reads ({first_line(error)[:300]}): "
            "copy or download it again and run the same command again"
        ) from error


def open_parquet(source: Source) -> Any:
    """Return the file as a `pyarrow.parquet.ParquetFile`."""
    with parquet_errors(source):
        # pre_buffer, the default, holds a complete row group: slower, with several times the memory.
        file = RemoteFile(source.path) if is_remote(source.path) else source.path
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)


def read_parquet_schema(source: Source) -> Any:
    """Return the Arrow schema of the file."""
    with open_parquet(source) as file, parquet_errors(source):
        return file.schema_arrow


class Columns(Protocol):
    """A file of columns; its rows are read by group."""

    schema: Any
    "of the columns, and of the fields of structs as 'a.b'"

    @property
    def num_rows(self) -> Sequence[int]:
        """The rows of each group."""

    def count_text_bytes(self, group: int, fields: Fields) -> int:
        """Return the uncompressed bytes of a group's text and title."""

    def iter_batches(self, group: int, fields: Fields) -> Iterator[Any]:
        """Yield the rows of a group as `pyarrow.RecordBatch`, with the columns that are read."""

    def close(self) -> None:
        """Close the file."""


def open_columns(source: Source) -> Columns:
    """Open a Parquet or Arrow file."""
    if source.format == "parquet":
        return _ParquetColumns(source)

    return ArrowColumns(source)


class _ParquetColumns:
    def __init__(self, source: Source) -> None:
        self._file = open_parquet(source)
        with parquet_errors(source):
            self._metadata = self._file.metadata
            self.schema = list_columns(self._file.schema_arrow)
        groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
        self.num_rows = [group.num_rows for group in groups]

    def count_text_bytes(self, group: int, fields: Fields) -> int:
        chunks = self._metadata.row_group(group)
        columns = (chunks.column(i) for i in range(self._metadata.num_columns))
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in {fields.text, fields.title})

    def iter_batches(self, group: int, fields: Fields) -> Iterator[Any]:
        text_bytes = self.count_text_bytes(group, fields)
        size = min(MAX_BATCH_ROWS, max(1, self.num_rows[group] * BATCH_BYTES // max(1, text_bytes)))
        names = columns_to_read(self.schema, fields)
        return self._file.iter_batches(row_groups=[group], columns=names, batch_size=size)  # type: ignore[no-any-return]

    def close(self) -> None:
        close_read(self._file)


def list_columns(schema: Any) -> Any:
    """Return the schema of a file with the fields of its structs as further columns, 'a.b' for b in the struct a."""
    fields = {field.name: field for field in schema}
    waiting = [field for field in schema if "." not in field.name]
    for field in waiting:
        if pa.types.is_struct(field.type):
            inside = [child.with_name(f"{field.name}.{child.name}") for child in field.type if "." not in child.name]
            waiting += inside
            fields = {each.name: each for each in inside} | fields
    return pa.schema([*schema, *(field for name, field in fields.items() if name not in schema.names)])


def take_columns(table: Any, names: Sequence[str]) -> Any:
    """Return a table with the fields of structs that are named as columns of their own."""
    nested = [name for name in names if name not in table.column_names]
    if not nested:
        return table
    columns = {name: table.column(name) for name in table.column_names if name in names}
    for name in nested:
        root, *path = name.split(".")
        columns[name] = pc.struct_field(table.column(root), path)
    return pa.table(columns)


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of strings."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def replace_leaves(kind: Any, replace: Callable[[Any], Any]) -> Any:
    """Return an Arrow type with `replace` applied to it, or to all leaves of a nested type."""

    def inside(field: Any) -> Any:
        return field.with_type(replace_leaves(field.type, replace))

    makers: dict[Any, Callable[[], Any]] = {
        pa.types.is_struct: lambda: pa.struct([inside(field) for field in kind]),
        pa.types.is_map: lambda: pa.map_(
            replace_leaves(kind.key_type, replace), inside(kind.item_field), kind.keys_sorted
        ),
        pa.types.is_list: lambda: pa.list_(inside(kind.value_field)),
        pa.types.is_large_list: lambda: pa.large_list(inside(kind.value_field)),
        pa.types.is_fixed_size_list: lambda: pa.list_(inside(kind.value_field), kind.list_size),
        pa.types.is_dictionary: lambda: pa.dictionary(
            kind.index_type, replace_leaves(kind.value_type, replace), kind.ordered
        ),
    }
    for is_kind, make in makers.items():
        if is_kind(kind):
            return make()
    if isinstance(kind, pa.BaseExtensionType):
        storage = replace_leaves(kind.storage_type, replace)
        return kind if storage == kind.storage_type else storage
    return replace(kind)


def can_be_kept(kind: Any) -> bool:
    """Return whether pyarrow can take values of a type, write them to Parquet and read them.

    An Arrow file may have types that Parquet has not, and older versions write fewer of them: decimal32 from 22 on.
    """
    if not _is_read_as_written(kind, inside=False):
        return False
    try:
        pq.write_table(pa.schema([("", without_views(kind))]).empty_table(), pa.BufferOutputStream())
    except pa.ArrowNotImplementedError:
        return False
    return True


def _is_read_as_written(kind: Any, *, inside: bool) -> bool:
    """Return whether values of a type are equal after writing and reading; `inside`: it is part of a nested type.

    pyarrow confuses values of list views and of extensions of views, and does not write an extension inside another
    type. Reading a struct with duplicate names is an error.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return not inside and without_views(kind.storage_type) == kind.storage_type
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return False
    if pa.types.is_dictionary(kind):
        return _is_read_as_written(kind.value_type, inside=True)
    fields = [kind.field(i) for i in range(kind.num_fields)]
    return len({field.name for field in fields}) == len(fields) and all(
        _is_read_as_written(field.type, inside=True) for field in fields
    )


def without_views(kind: Any) -> Any:
    """Return an Arrow type with views replaced, whose values pyarrow's `take` supports."""
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return replace_leaves(kind, lambda leaf: views.get(leaf, leaf))


def check_columns(source: Source, schema: Any, fields: Fields, flags: FieldFlags = ENCODE_FLAGS) -> None:
    """Check that a file has the text column, and text, title and id of a valid type."""
    if fields.text not in schema.names:
        raise CorpusError(
            f"{source.name} has no text column {fields.text!r}; it has {', '.join(schema.names[:20])}: "
            f"leave the file out, or name the column with {flags.text}"
        )
    named = [(fields.text, flags.text), (fields.title, flags.title), (fields.id, flags.id)]
    for name, flag in (*named, *((name, flags.kept) for name in fields.kept)):
        if schema.names.count(name) > 1:
            raise CorpusError(
                f"{source.name} has {schema.names.count(name)} columns named {name!r}: rename all but one of them, "
                f"or name another column with {flag}"
            )
    for name, flag in named:
        if name is None or name not in schema.names:
            continue
        kind = schema.field(name).type
        integer_id = flag == flags.id and pa.types.is_integer(kind)
        if not (is_text(kind) or integer_id or pa.types.is_null(kind)):
            wanted = "strings or integers" if flag == flags.id else "strings"
            raise CorpusError(
                f"{source.name}: column {name!r} is {kind}, and {wanted} are needed: "
                f"convert it, or name another column with {flag}"
            )


def columns_to_read(schema: Any, fields: Fields) -> list[str]:
    """Return the columns of the file that are read."""
    wanted = (fields.id, fields.title, fields.text, *fields.kept)
    return [name for name in dict.fromkeys(wanted) if name is not None and name in schema.names]


class GroupCursor:
    """One row group, read once from start to end."""

    def __init__(self, source: Source, file: Columns, *, group: int, fields: Fields) -> None:
        self.group = group
        self.at = 0
        "next row of the group"
        self._source = source
        self._columns = columns_to_read(file.schema, fields)
        with parquet_errors(source):
            self._batches = file.iter_batches(group, fields)
        self._batch: Any = None

    def take(self, start: int, stop: int) -> Any:
        """Return rows [start, stop) of the group as a table; calls are in ascending order."""
        pieces: list[Any] = []
        self._read_rows(start - self.at, [])
        self._read_rows(stop - self.at, pieces)
        with parquet_errors(self._source):
            table = take_columns(pa.Table.from_batches(pieces), self._columns)
            schema = pa.schema([field.with_type(without_views(field.type)) for field in table.schema])
            return table.cast(schema).unify_dictionaries().combine_chunks()

    def _read_rows(self, count: int, pieces: list[Any]) -> None:
        while count > 0:
            if self._batch is None or self._batch.num_rows == 0:
                self._batch = self._next_batch()
            piece = self._batch.slice(0, count)
            self._batch = self._batch.slice(piece.num_rows)
            pieces.append(piece)
            self.at += piece.num_rows
            count -= piece.num_rows

    def _next_batch(self) -> Any:
        with parquet_errors(self._source):
            batch = next(self._batches, None)
        if batch is None:
            raise CorpusError(
                f"{self._source.name} is corrupt: row group {self.group} has fewer rows than it should; "
                "copy or download it again and run the same command again"
            )
        return batch


def split_table(table: Any, *, first_position: int, fields: Fields, max_row_bytes: int) -> Iterator[RawRow]:
    """Yield each row with its number in the file; with its bytes only if it is a fault."""
    wanted = dict.fromkeys((fields.id, fields.title, fields.text))
    names = [name for name in wanted if name is not None and name in table.column_names]
    columns = [_list_values(table.column(name)) for name in names]
    lengths = sum(_count_bytes(table.column(name)) for name in names if name != fields.id)
    invalid = _find_invalid_kept(table, fields.kept)
    for index, values in enumerate(zip(*columns, strict=True)):
        position = first_position + index
        raw = b"\t".join(value if type(value) is bytes else str(value).encode() for value in values[-2:])
        if bytes in map(type, values):
            yield position, raw, Fault(reason=INVALID_UTF8)
        elif index in invalid:
            yield position, raw, Fault(reason=INVALID_UTF8, detail=f"in kept field {invalid[index]!r}")
        elif lengths[index] > max_row_bytes:
            yield position, raw, Fault(reason=TOO_LONG, detail=f"{lengths[index]:,} bytes")
        else:
            yield position, b"", dict(zip(names, values, strict=True))


def _find_invalid_kept(table: Any, kept: Sequence[str]) -> dict[int, str]:
    """Return the rows with a string that is not UTF-8 in a kept column, at any depth, and the column's name."""
    invalid: dict[int, str] = {}
    for name in kept:
        if name in table.column_names and not _is_utf8(table.column(name)):
            column = table.column(name)
            column = column.cast(replace_leaves(column.type, _make_number))
            invalid |= {row: name for row in range(len(column)) if not _is_decoded(column[row])}
    return invalid


def _is_utf8(column: Any) -> bool:
    """Return whether all strings of a column are UTF-8; Arrow validates only a cast from bytes."""
    raw = replace_leaves(column.type, lambda leaf: BYTES_OF.get(leaf, leaf))
    try:
        if raw != column.type:
            column.cast(raw).cast(column.type)
    except pa.ArrowInvalid:
        return False
    return True


def _is_decoded(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _list_values(column: Any) -> list[Any]:
    """Return a column's values; a string that is not UTF-8 as bytes."""
    if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        return column.to_pylist()  # type: ignore[no-any-return]
    try:
        return column.cast(pa.large_string()).to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_decode(value) for value in as_binary(column).to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def as_binary(column: Any) -> Any:
    """Return a column of text as large_binary."""
    text = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    return text.cast(pa.large_string()).cast(pa.large_binary()) if is_text(text.type) else text.cast(pa.large_binary())


def _count_bytes(column: Any) -> Any:
    if pa.types.is_null(column.type):
        return np.zeros(len(column), np.int64)
    return pc.binary_length(as_binary(column)).fill_null(0).to_numpy()


def hash_table(table: Any) -> str:
    """Hash a table's values, column after column: names, each value's length (-1: null), values."""
    digest = xxhash.xxh3_128()
    for name in table.column_names:
        values = _canonical_bytes(table.column(name))
        lengths = pc.binary_length(values).fill_null(-1).to_numpy().astype("<i8")
        digest.update(f"{name}\0{len(lengths)}\0".encode())
        digest.update(lengths.tobytes())
        for chunk in values.fill_null(b"").chunks:
            _, offsets, data = chunk.buffers()
            bounds = np.frombuffer(offsets, "<i8")[chunk.offset : chunk.offset + len(chunk) + 1]
            if data is not None:
                digest.update(data[bounds[0] : bounds[-1]])
    return digest.hexdigest()


def _canonical_bytes(column: Any) -> Any:
    """Return values as large_binary: strings and bytes as they are, anything else as its text."""
    if is_text(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return as_binary(column)
    if pa.types.is_null(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.string()).cast(pa.large_binary())
    # As numbers, since the text of a time in a zone depends on the machine's time zone database.
    plain = replace_leaves(column.type, lambda leaf: pa.int64() if getattr(leaf, "tz", None) is not None else leaf)
    values = _list_any(column if plain == column.type else column.cast(plain))
    # repr is distinct for every value, nested ones and floats too, and independent of the memory layout.
    texts = [None if value is None else repr(value) for value in values]
    return pa.chunked_array([pa.array(texts, pa.string()).cast(pa.large_binary())])


def list_rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch; a column with dates that Python cannot represent as `_list_any` does.

    Raises:
        UnicodeDecodeError: a string is not UTF-8.
    """
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        raise
    except UNREADABLE_DATE:
        columns = {name: _list_any(batch.column(name)) for name in batch.schema.names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _list_any(column: Any) -> list[Any]:
    """Return a column's values as Python values, with numbers and bytes for those that Python cannot represent.

    These are nanoseconds (which become pandas values if pandas is installed), dates after the year 9999, unknown time
    zones and strings that are not UTF-8.
    """
    kind = column.type
    if replace_leaves(kind, lambda leaf: pa.null() if getattr(leaf, "unit", "") == "ns" else leaf) == kind:
        try:
            return column.to_pylist()  # type: ignore[no-any-return]
        except UNREADABLE_DATE:
            pass
    plain = replace_leaves(kind, lambda leaf: _make_number(BYTES_OF.get(leaf, leaf)))
    return column.cast(plain).to_pylist()  # type: ignore[no-any-return]


def _make_number(leaf: Any) -> Any:
    """Return the integer type in which a date or time is stored; any other type unchanged."""
    if not pa.types.is_temporal(leaf):
        return leaf
    return pa.int32() if leaf.bit_width == 32 else pa.int64()


FILE_MAGIC = b"ARROW1"


class ArrowColumns:
    """An Arrow file as one group of rows; local files are mapped, so that rows that are passed over are not read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        with parquet_errors(source):
            remote = is_remote(source.path)
            self._file = pa.PythonFile(RemoteFile(source.path)) if remote else pa.memory_map(source.path)
            self._is_stream = self._file.read(len(FILE_MAGIC)) != FILE_MAGIC
            self._columns = self._open(None).schema
            self.schema = list_columns(self._columns)

    @cached_property
    def num_rows(self) -> Sequence[int]:
        """The rows of the file, as of its only group."""
        with parquet_errors(self._source):
            return [sum(batch.num_rows for batch in self._read(self._columns.names[:1]))]

    def count_text_bytes(self, group: int, fields: Fields) -> int:
        """Return the bytes of text and title."""
        del group
        names = [name for name in (fields.text, fields.title) if name is not None and name in self.schema.names]
        with parquet_errors(self._source):
            batches = map(check_offsets, self._read(names))
            tables = (take_columns(pa.Table.from_batches([batch]), names) for batch in batches)
            lengths = (pc.binary_length(as_binary(table.column(name))) for table in tables for name in names)
            return sum(pc.sum(each).as_py() or 0 for each in lengths)

    def iter_batches(self, group: int, fields: Fields) -> Iterator[Any]:
        """Yield the rows with the columns that are read."""
        del group
        return map(check_offsets, self._read(columns_to_read(self.schema, fields)))

    def _read(self, names: Sequence[str]) -> Iterator[Any]:
        """Yield the batches of the file with some columns; structs are complete."""
        roots = {name if name in self._columns.names else name.partition(".")[0] for name in names}
        reader = self._open([index for index, name in enumerate(self._columns.names) if name in roots])
        return iter(reader) if self._is_stream else map(reader.get_batch, range(reader.num_record_batches))

    def _open(self, columns: list[int] | None) -> Any:
        self._file.seek(0)
        options = ipc.IpcReadOptions(included_fields=columns)
        return (ipc.open_stream if self._is_stream else ipc.open_file)(self._file, options=options)

    def close(self) -> None:
        """Close the file."""
        close_read(self._file)


def check_offsets(batch: Any) -> Any:
    """Return a batch after a look at its offsets and indices, which Arrow would follow anywhere; raise ArrowInvalid.

    Strings that are not UTF-8 are left to their rows.
    """
    batch.validate()
    for column in batch.columns:
        raw = replace_leaves(column.type, lambda leaf: BYTES_OF.get(leaf, leaf))
        (column if raw == column.type else column.cast(raw)).validate(full=True)
    return batch

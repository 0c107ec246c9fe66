"""Arrow files: the file format, which Feather is too, and the stream format, which datasets.save_to_disk writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from m3cli.corpus.parquet import (
    BYTES_OF,
    as_binary,
    columns_to_read,
    list_columns,
    parquet_errors,
    replace_leaves,
    take_columns,
)
from m3cli.corpus.remote import RemoteFile, is_remote
from m3cli.records import Fields, Source

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
        self._file.close()


def check_offsets(batch: Any) -> Any:
    """Return a batch after a look at its offsets and indices, which Arrow would follow anywhere; raise ArrowInvalid.

    Strings that are not UTF-8 are left to their rows.
    """
    batch.validate()
    for column in batch.columns:
        raw = replace_leaves(column.type, lambda leaf: BYTES_OF.get(leaf, leaf))
        (column if raw == column.type else column.cast(raw)).validate(full=True)
    return batch

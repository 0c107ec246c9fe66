"""Read dense vectors directly from the pages of a Parquet row group.

Arrow assembles a fixed-size list value by value, which is slow. A page of lists without nulls is a few bytes of levels
followed by the values, so the values can be copied. Any other page, also a damaged one, is left to Arrow's reader.
Page headers are structs of Thrift's compact protocol (`parquet.thrift`: PageHeader).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from m3cli.store.layout import VECTOR_COLUMNS

# Thrift's compact types, and the fields and values of PageHeader and DataPageHeader
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 0, 1, 2, 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_KIND, _FULL_SIZE, _SIZE, _DATA_PAGE = 1, 2, 3, 5
_NUM_VALUES, _ENCODING = 1, 2
_PLAIN = 0
_DEPTH = 2
"of nested structs in a PageHeader: DataPageHeader and its Statistics"
_INTEGER_BITS = 64
_LEVEL_SIZE = 4
"bytes that hold the length of the repetition and of the definition levels"


class DensePages:
    """Pages of the dense column of an open Parquet file."""

    def __init__(self, file: pq.ParquetFile, path: Path) -> None:
        self._metadata = file.metadata
        self._content: NDArray[np.uint8] = np.memmap(path, np.uint8, "r").view(np.ndarray)
        kind = file.schema_arrow.field(VECTOR_COLUMNS["dense"]).type
        self._dim: int = kind.list_size
        self._dtype = np.dtype("<f2" if kind.value_type == pa.float16() else "<f4")
        roots = [file.schema.column(position).path.split(".")[0] for position in range(len(file.schema))]
        self._column_index = roots.index(VECTOR_COLUMNS["dense"])

    def read(self, group: int) -> NDArray[np.floating] | None:
        """Return the vectors [R, dim] of a row group; None if its pages are not plain values."""
        column = self._metadata.row_group(group).column(self._column_index)
        first, length = column.data_page_offset, column.total_compressed_size
        codec = None if column.compression == "UNCOMPRESSED" else pa.Codec(column.compression.lower())
        filled = 0
        try:
            values = np.empty(column.num_values * self._dtype.itemsize, np.uint8)
            for page in _iter_values(self._content[first : first + length], codec, self._dtype.itemsize):
                values[filled : filled + len(page)] = page
                filled += len(page)
        except (IndexError, KeyError, TypeError, ValueError, MemoryError, OSError, pa.ArrowException):
            return None
        return values.view(self._dtype).reshape(-1, self._dim) if filled == len(values) else None


def _iter_values(pages: NDArray[np.uint8], codec: pa.Codec | None, size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of each page's values, `size` bytes each; an unknown page raises one of several exceptions."""
    position = 0
    while position < len(pages):
        header, position = _read_struct(pages, position)
        if header[_KIND] != 0 or header[_DATA_PAGE][_ENCODING] != _PLAIN:
            raise ValueError("not a plain data page")
        page = pages[position : position + max(header[_SIZE], 0)]
        position += len(page)
        if codec is not None:
            page = np.frombuffer(codec.decompress(page, header[_FULL_SIZE]), np.uint8)
        if len(page) != header[_FULL_SIZE]:
            raise ValueError("the file ends within a page")
        begin = 0
        for _ in ("repetition", "definition"):
            begin += _LEVEL_SIZE + int(page[begin : begin + _LEVEL_SIZE].view("<u4")[0])
        if len(page) - begin != header[_DATA_PAGE][_NUM_VALUES] * size:
            raise ValueError("a value is missing")
        yield page[begin:]


def _read_struct(content: NDArray[np.uint8], position: int, *, depth: int = _DEPTH) -> tuple[dict[int, Any], int]:
    """Return the fields of a Thrift struct by number, and the position after it."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := int(content[position])) != _STOP:
        position += 1
        step, kind = head >> 4, head & 15
        if step:
            number += step
        else:
            number, position = _read_integer(content, position)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind in _INTEGERS:
            fields[number], position = _read_integer(content, position)
        elif kind == _BINARY:
            length, position = _read_varint(content, position)
            position += length
        elif kind == _STRUCT and depth:
            fields[number], position = _read_struct(content, position, depth=depth - 1)
        elif kind in (_BYTE, _DOUBLE):
            position += 1 if kind == _BYTE else 8
        else:
            raise ValueError(f"unknown field type {kind}")
    return fields, position + 1


def _read_integer(content: NDArray[np.uint8], position: int) -> tuple[int, int]:
    folded, position = _read_varint(content, position)
    return (folded >> 1) ^ -(folded & 1), position


def _read_varint(content: NDArray[np.uint8], position: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := int(content[position])) & 128 and shift < _INTEGER_BITS:
        value |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
    return value | byte << shift, position + 1

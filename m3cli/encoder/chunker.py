"""Documents to rows of tokens: one row each, or several where a document is longer than `max_length`.

Invariants: no row has more than `max_length` tokens, `<s>`, `</s>` and prefix included; without overlap the spans of a
document's rows tile its text (the first begins at 0, each ends where the next begins, the last ends at the end); a
row's ids are those of the document's own tokens, so a cut inside a word leaves tokens that the piece alone would not
have. Offsets are Unicode code points of `Document.text`; the prefix is no part of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from m3cli.config import LongDocs
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.errors import UsageError
from m3cli.records import Chunks, Document

NUM_SPECIALS = 2

Row = tuple[NDArray[np.int32], int, int, int, int, bool]
"input_ids, chunk_index, num_chunks, char_start, char_end, truncated"


def chunk_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlap: int = 0,
    long_docs: LongDocs = "chunk",
    prefix: str = "",
) -> Chunks:
    """Tokenise documents and cut those that are longer than `max_length` tokens.

    Raises:
        UsageError: prefix and overlap leave no room for text in `max_length`.
    """
    texts = [prefix + document.text for document in documents] if prefix else [document.text for document in documents]
    rows: list[Row] = []
    owners: list[int] = []
    for owner, (document, input_ids) in enumerate(zip(documents, tokenizer.encode(texts), strict=True)):
        if len(input_ids) <= max_length:
            rows.append((input_ids, 0, 1, 0, len(document.text), False))
            owners.append(owner)
            continue
        pieces = cut_document(
            document.text, tokenizer, max_length=max_length, overlap=overlap, long_docs=long_docs, prefix=prefix
        )
        before = len(rows)
        rows.extend(pieces)
        owners.extend([owner] * (len(rows) - before))
    return _to_chunks(rows, owners)


def cut_document(
    text: str, tokenizer: Tokenizer, *, max_length: int, overlap: int, long_docs: LongDocs, prefix: str
) -> Iterator[Row]:
    """Yield the rows of one document that does not fit `max_length`."""
    encoding = tokenizer.encode_with_offsets(prefix + text)
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) - len(prefix)
    # A token that reaches past the prefix (SentencePiece glues the blank before a word to it) is the text's.
    num_prefix = int(np.count_nonzero(offsets[:, 1] <= 0)) if prefix else 0
    starts = np.maximum(offsets[num_prefix:, 0], 0)
    starts[0] = 0
    body = ids[num_prefix:]
    size = max_length - NUM_SPECIALS - num_prefix
    spans = cut_windows(len(body), size=size, overlap=overlap)
    if long_docs == "truncate":
        spans = spans[:1]
    bos, eos = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    for index, (first, last) in enumerate(spans):
        char_end = len(text) if last == len(body) else int(starts[last])
        truncated = long_docs == "truncate" and last < len(body)
        input_ids = np.concatenate((bos, ids[:num_prefix], body[first:last], eos))
        yield input_ids, index, len(spans), int(starts[first]), char_end, truncated


def cut_windows(num_tokens: int, *, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return [start, stop) of windows of at most `size` tokens, each but the first repeating `overlap` tokens.

    Raises:
        UsageError: `size` leaves no token beyond the overlap.
    """
    if size <= overlap:
        raise UsageError(
            f"--overlap {overlap} and --prefix leave no room: a chunk holds {max(size, 0)} tokens of text; "
            "lower --overlap, shorten --prefix or raise --max-length"
        )
    step = size - overlap
    last_start = max(0, num_tokens - overlap - 1) // step * step
    return [(start, min(start + size, num_tokens)) for start in range(0, last_start + 1, step)]


def _to_chunks(rows: list[Row], owners: list[int]) -> Chunks:
    lengths = accumulate((len(row[0]) for row in rows), initial=0)
    ids = [row[0] for row in rows]
    return Chunks(
        input_ids=np.concatenate(ids) if ids else np.empty(0, np.int32),
        cu_seqlens=np.fromiter(lengths, np.int64, len(rows) + 1),
        document=np.array(owners, np.int64),
        chunk_index=np.fromiter((row[1] for row in rows), np.int32, len(rows)),
        num_chunks=np.fromiter((row[2] for row in rows), np.int32, len(rows)),
        char_start=np.fromiter((row[3] for row in rows), np.int64, len(rows)),
        char_end=np.fromiter((row[4] for row in rows), np.int64, len(rows)),
        truncated=np.fromiter((row[5] for row in rows), np.bool_, len(rows)),
    )

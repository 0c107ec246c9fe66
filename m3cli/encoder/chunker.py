"""Documents to rows of tokens: one row each, or several where a document is longer than `max_length`.

Invariants: no row has more than `max_length` tokens, `<s>`, `</s>` and prefix included; without overlap the spans of a
document's rows tile its text (the first begins at 0, each ends where the next begins, the last ends at the end); a
row's ids are those of the document's own tokens: at white space the same as the piece alone would have, and where a
row begins inside a word its first token, seldom the first few, may be others. Offsets are Unicode code points of
`Document.text`; the prefix is no part of them. A document takes time and memory in proportion to its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from m3cli.config import EncodeConfig, LongDocs, Split
from m3cli.encoder.segments import SEGMENT_CHARS, TextTokens, read_texts
from m3cli.encoder.split import Window, cut_windows
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.errors import UsageError
from m3cli.records import Chunks, Document

NUM_SPECIALS = 2
LIKELY_CHARS = 4
"of a text to a token: one with more than this times `max_length` is likely too long"

Row = tuple[NDArray[np.int32], int, int, int, int, bool, int]
"input_ids, chunk_index, num_chunks, char_start, char_end, truncated, num_repeated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How documents are cut."""

    max_length: int
    "tokens of a row, <s>, </s> and prefix included"
    overlap: int = 0
    split: Split = "sentence"
    long_docs: LongDocs = "chunk"
    prefix: str = ""


def cutting_of(config: EncodeConfig) -> Cutting:
    """Return how a run cuts documents."""
    return Cutting(
        max_length=config.max_length,
        overlap=config.overlap,
        split=config.split,
        long_docs=config.long_docs,
        prefix=config.prefix,
    )


def refuse_no_room(tokenizer: Tokenizer, cutting: Cutting) -> None:
    """Refuse a prefix and an overlap that leave no room for text in a chunk.

    Raises:
        UsageError: naming both, and the length.
    """
    num_prefix = len(tokenizer.backend.encode(cutting.prefix, add_special_tokens=False).ids)
    room = cutting.max_length - NUM_SPECIALS - num_prefix
    if room <= cutting.overlap:
        raise UsageError(
            f"--prefix of {num_prefix} tokens and --overlap {cutting.overlap}: a chunk of {cutting.max_length} tokens "
            f"has room for {cutting.max_length - NUM_SPECIALS}, and none is left for text; "
            "shorten --prefix, lower --overlap or raise --max-length"
        )


def chunk_documents(documents: Sequence[Document], tokenizer: Tokenizer, cutting: Cutting) -> Chunks:
    """Tokenise documents and cut those that are longer than `max_length` tokens.

    Raises:
        UsageError: prefix and overlap leave no room for text in `max_length`.
    """
    # What is surely or likely too long goes straight to the way that knows places, which costs twice as much a token;
    # nothing goes both ways but what is longer than its characters promise.
    most_chars = min(SEGMENT_CHARS, LIKELY_CHARS * cutting.max_length)
    tried = [cutting.prefix + document.text for document in documents if len(document.text) <= most_chars]
    found = (ids if len(ids) <= cutting.max_length else None for ids in tokenizer.encode(tried))
    whole = [next(found) if len(document.text) <= most_chars else None for document in documents]
    tokens = read_texts(
        (document.text for document, input_ids in zip(documents, whole, strict=True) if input_ids is None),
        tokenizer,
        prefix=cutting.prefix,
        enough=cutting.max_length if cutting.long_docs == "truncate" else None,
    )
    rows: list[Row] = []
    owners: list[int] = []
    for owner, (document, input_ids) in enumerate(zip(documents, whole, strict=True)):
        if input_ids is not None:
            rows.append((input_ids, 0, 1, 0, len(document.text), False, 0))
        else:
            rows.extend(cut_document(document.text, next(tokens), tokenizer, cutting))
        owners.extend([owner] * (len(rows) - len(owners)))
    return _to_chunks(rows, owners)


def cut_document(text: str, tokens: TextTokens, tokenizer: Tokenizer, cutting: Cutting) -> Iterator[Row]:
    """Yield the rows of one document that is, or may be, longer than `max_length`."""
    truncate = cutting.long_docs == "truncate"
    size = cutting.max_length - NUM_SPECIALS - max(len(tokens.lead_ids), len(tokens.prefix_ids))
    num_tokens = len(tokens.input_ids)
    if NUM_SPECIALS + len(tokens.lead_ids) + num_tokens <= cutting.max_length:
        windows = [Window(0, num_tokens, 0)]
    elif truncate:
        windows = cut_windows(tokens.levels, size=size, overlap=0, split="tokens")[:1]
    else:
        windows = cut_windows(tokens.levels, size=size, overlap=cutting.overlap, split=cutting.split)
    bos, eos = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    for index, window in enumerate(windows):
        char_start = int(tokens.starts[window.start]) if index else 0
        char_end = len(text) if window.stop == num_tokens else int(tokens.starts[window.stop])
        before = tokens.prefix_ids if index else tokens.lead_ids
        input_ids = np.concatenate((bos, before, tokens.input_ids[window.start : window.stop], eos))
        repeated = window.repeated + len(tokens.prefix_ids) if index else 0
        yield input_ids, index, len(windows), char_start, char_end, window.stop < num_tokens and truncate, repeated


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
        num_repeated=np.fromiter((row[6] for row in rows), np.int32, len(rows)),
    )

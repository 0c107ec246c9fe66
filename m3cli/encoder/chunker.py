"""Documents as chunks: tokenised, and cut into windows if they are longer than `max_length` tokens.

With split `tokens` every window is full and repeats exactly `overlap` tokens of the previous one. With `sentence`
windows have about equal length, and each ends at the best border within reach of it: of a paragraph, or else of a
sentence, a line, a word. An overlap begins at the best border too, so it has `overlap` to `overlap` + reach tokens.
The reach is an eighth of the tokens that a window can have beyond its overlap.

No window ends inside a character that fits a window: such a cut moves to the nearest border between characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from m3cli.config import EncodeConfig, LongDocs, Split
from m3cli.encoder.tokenizer import SEGMENT_CHARS, Border, TextTokens, Tokenizer, read_texts
from m3cli.errors import UsageError
from m3cli.records import Chunks, Document

REACH_PART = 8
"fraction (1 / REACH_PART) of a window's new tokens in which a border is searched, to either side"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a text, the first `repeated` of which are in the previous window too."""

    start: int
    stop: int
    repeated: int


def cut_windows(levels: NDArray[np.uint8], *, size: int, overlap: int, split: Split) -> list[Window]:
    """Return the windows of T tokens, at least one, of at most `size` tokens each.

    `levels` [T] is the `Border` before each token.

    Raises:
        UsageError: `size` leaves no token beyond the overlap.
    """
    if size <= overlap:
        raise UsageError(
            f"--overlap {overlap} and --prefix leave no space for text: a chunk holds {max(size, 0)} tokens of it; "
            "lower --overlap, shorten --prefix or raise --max-length"
        )
    reach = (size - overlap) // REACH_PART if split == "sentence" else 0
    windows: list[Window] = []
    start = covered = 0
    while len(levels) - start > size:
        limit, target = size - (covered - start), 0
        if split == "sentence":
            repeated = overlap if covered == 0 else 0  # by the second window, of the first
            remaining = len(levels) - covered - repeated
            target = repeated + -(-remaining // -(-remaining // (size - overlap - reach)))
        stop = _choose_stop(levels, covered, limit=limit, target=min(target, limit) or limit, reach=reach)
        windows.append(Window(start, stop, covered - start))
        start, covered = _choose_start(levels, start, stop, overlap=overlap, reach=reach, size=size), stop
    return [*windows, Window(start, len(levels), covered - start)]


def _choose_stop(levels: NDArray[np.uint8], covered: int, *, limit: int, target: int, reach: int) -> int:
    low, high = covered + max(1, target - reach), covered + min(limit, target + reach)
    stop = _find_best(levels, low, high, near=covered + target)
    if levels[stop] > Border.GRAPHEME:
        return stop
    return _find_nearest(levels, covered + 1, covered + limit, near=covered + target)


def _choose_start(levels: NDArray[np.uint8], previous: int, stop: int, *, overlap: int, reach: int, size: int) -> int:
    """Return the start of the window after [previous, stop)."""
    if overlap == 0:
        return stop
    high = max(previous + 1, stop - overlap)
    start = _find_best(levels, max(previous + 1, high - reach), high, near=high)
    if levels[start] > Border.GRAPHEME:
        return start
    # At least half of a window beyond its overlap remains for new tokens.
    return _find_nearest(levels, max(previous + 1, high - (size - overlap) // 2), stop, near=high)


def _find_best(levels: NDArray[np.uint8], low: int, high: int, *, near: int) -> int:
    """Return the best border in [low, high], of equal ones the nearest to `near`."""
    found = levels[low : high + 1]
    best = np.flatnonzero(found == found.max()) + low
    return int(best[np.argmin(np.abs(best - near))])


def _find_nearest(levels: NDArray[np.uint8], low: int, high: int, *, near: int) -> int:
    """Return the border between graphemes in [low, high] nearest to `near`, or else one between code points."""
    found = levels[low : high + 1]
    for least in (Border.INSIDE_WORD, Border.GRAPHEME):
        indices = np.flatnonzero(found >= least) + low
        if len(indices):
            return int(indices[np.argmin(np.abs(indices - near))])
    return near


NUM_SPECIALS = 2
LIKELY_CHARS = 4
"characters a token: a text of more than this times `max_length` is likely too long"

Row = tuple[NDArray[np.int32], int, int, int, int, bool, int]
"input_ids, chunk_index, num_chunks, char_start, char_end, truncated, num_repeated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """Options of cutting documents."""

    max_length: int
    "tokens of a row, <s>, </s> and prefix included"
    overlap: int = 0
    split: Split = "sentence"
    long_docs: LongDocs = "chunk"
    prefix: str = ""


def cutting_of(config: EncodeConfig) -> Cutting:
    """Return the options of cutting in a config."""
    return Cutting(
        max_length=config.max_length,
        overlap=config.overlap,
        split=config.split,
        long_docs=config.long_docs,
        prefix=config.prefix,
    )


def check_chunk_space(tokenizer: Tokenizer, cutting: Cutting) -> None:
    """Check that prefix and overlap leave space for text in a chunk.

    Raises:
        UsageError: they do not.
    """
    num_prefix = len(tokenizer.backend.encode(cutting.prefix, add_special_tokens=False).ids)
    if cutting.max_length - NUM_SPECIALS - num_prefix <= cutting.overlap:
        raise UsageError(
            f"--prefix of {num_prefix} tokens and --overlap {cutting.overlap}: a chunk of {cutting.max_length} tokens "
            f"holds {cutting.max_length - NUM_SPECIALS} of them, and none remains for text; "
            "shorten --prefix, lower --overlap or raise --max-length"
        )


def chunk_documents(documents: Sequence[Document], tokenizer: Tokenizer, cutting: Cutting) -> Chunks:
    """Tokenise documents and cut those that are longer than `max_length` tokens.

    Raises:
        UsageError: prefix and overlap leave no space for text in `max_length`.
    """
    # Tokens with offsets cost twice as much: only texts that are likely too long, or turn out so, are read with them.
    max_chars = min(SEGMENT_CHARS, LIKELY_CHARS * cutting.max_length)
    short = [cutting.prefix + document.text for document in documents if len(document.text) <= max_chars]
    encoded = (ids if len(ids) <= cutting.max_length else None for ids in tokenizer.encode(short))
    complete = [next(encoded) if len(document.text) <= max_chars else None for document in documents]
    tokens = read_texts(
        (document.text for document, input_ids in zip(documents, complete, strict=True) if input_ids is None),
        tokenizer,
        prefix=cutting.prefix,
        enough=cutting.max_length if cutting.long_docs == "truncate" else None,
    )
    rows: list[Row] = []
    owners: list[int] = []
    for owner, (document, input_ids) in enumerate(zip(documents, complete, strict=True)):
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


def lengths_with_mcls(num_tokens: NDArray[np.int64], *, every: int) -> NDArray[np.int64]:
    """Return the token counts of rows after MCLS adds its `<s>`; `every` 0 adds none."""
    if not every:
        return num_tokens
    # The row's own <s> is the one of the first `every` tokens of text.
    return num_tokens + np.maximum(0, (num_tokens - 3) // every)


def fit_length(limit: int, *, every: int) -> int:
    """Return the largest token count of a row that MCLS extends to at most `limit` tokens."""
    length = limit - max(0, (limit - 3) // (every + 1))
    while lengths_with_mcls(np.array([length]), every=every)[0] > limit:
        length -= 1
    return length

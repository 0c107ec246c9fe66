"""The tokens of a long text to windows, each of which becomes a chunk.

`tokens`: every window is full, and repeats exactly `overlap` tokens of the one before. `sentence`: windows are of about
equal length, so that the last is no sliver, and end at the best border in reach of that length: a paragraph's end, or
else a sentence's, a line's, a word's. An overlap begins at the best border too, so it has `overlap` to `overlap` +
reach tokens. The reach is an eighth of the tokens by which a window can go on from the one before.

No window ends inside a character as long as one fits: a cut that would is moved to the nearest border of characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from m3cli.config import EncodeConfig, LongDocs, Split
from m3cli.encoder.segments import SEGMENT_CHARS, Border, TextTokens, read_texts
from m3cli.encoder.tokenizer import Tokenizer
from m3cli.errors import UsageError
from m3cli.records import Chunks, Document

REACH_PART = 8
"of the tokens that a window can have beyond its overlap, the part that a border is looked for in, to either side"


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a text, of which the first `repeated` are in the window before too."""

    start: int
    stop: int
    repeated: int


def cut_windows(levels: NDArray[np.uint8], *, size: int, overlap: int, split: Split) -> list[Window]:
    """Cut T tokens, given how good the border before each is [T], into windows of at most `size`; at least one.

    Raises:
        UsageError: `size` leaves no token beyond the overlap.
    """
    if size <= overlap:
        raise UsageError(
            f"--overlap {overlap} and --prefix leave no room: a chunk holds {max(size, 0)} tokens of text; "
            "lower --overlap, shorten --prefix or raise --max-length"
        )
    reach = (size - overlap) // REACH_PART if split == "sentence" else 0
    windows: list[Window] = []
    start = covered = 0
    while len(levels) - start > size:
        room, target = size - (covered - start), 0
        if split == "sentence":
            ahead = overlap if covered == 0 else 0  # of the first window, which the second is to repeat
            left = len(levels) - covered - ahead
            target = ahead + -(-left // -(-left // (size - overlap - reach)))
        stop = _choose_stop(levels, covered, room=room, target=min(target, room) or room, reach=reach)
        windows.append(Window(start, stop, covered - start))
        start, covered = _choose_start(levels, start, stop, overlap=overlap, reach=reach, size=size), stop
    return [*windows, Window(start, len(levels), covered - start)]


def _choose_stop(levels: NDArray[np.uint8], covered: int, *, room: int, target: int, reach: int) -> int:
    low, high = covered + max(1, target - reach), covered + min(room, target + reach)
    stop = _find_best(levels, low, high, near=covered + target)
    if levels[stop] > Border.GRAPHEME:
        return stop
    return _find_nearest(levels, covered + 1, covered + room, near=covered + target)


def _choose_start(levels: NDArray[np.uint8], before: int, stop: int, *, overlap: int, reach: int, size: int) -> int:
    """Return where the window after [before, stop) begins."""
    if overlap == 0:
        return stop
    high = max(before + 1, stop - overlap)
    start = _find_best(levels, max(before + 1, high - reach), high, near=high)
    if levels[start] > Border.GRAPHEME:
        return start
    # At least half of what a window has beyond its overlap stays free for new tokens.
    return _find_nearest(levels, max(before + 1, high - (size - overlap) // 2), stop, near=high)


def _find_best(levels: NDArray[np.uint8], low: int, high: int, *, near: int) -> int:
    """Return the best border in [low, high], and of equal ones the nearest to `near`."""
    found = levels[low : high + 1]
    best = np.flatnonzero(found == found.max()) + low
    return int(best[np.argmin(np.abs(best - near))])


def _find_nearest(levels: NDArray[np.uint8], low: int, high: int, *, near: int) -> int:
    """Return the border between characters in [low, high] nearest to `near`, or else one inside a grapheme."""
    found = levels[low : high + 1]
    for least in (Border.INSIDE_WORD, Border.GRAPHEME):
        places = np.flatnonzero(found >= least) + low
        if len(places):
            return int(places[np.argmin(np.abs(places - near))])
    return near


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


def check_chunk_room(tokenizer: Tokenizer, cutting: Cutting) -> None:
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

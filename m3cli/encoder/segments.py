"""The tokens of one text of any size, with their places and how good the borders before them are.

A long text is tokenised in segments of at most SEGMENT_CHARS characters, which keeps time and memory linear. They are
cut before a run of white space, where a tokeniser that splits at white space finds the same tokens as in the whole
text. Only where there is none in a whole segment (a script without blanks, joined-up data) is a cut made between two
characters, after a full stop if there is one near: there the token that follows may be another than in the whole text.
"""

# ruff: noqa: RUF001  - punctuation of other scripts is meant

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from m3cli.encoder.borders import rate_borders
from m3cli.encoder.tokenizer import Tokenizer

SEGMENT_CHARS = 1 << 15
CONTEXT_CHARS = 64
"around a segment that its outermost borders are rated by"
SEGMENTS_TOGETHER = 32
"that are spread over the cores"
_BLANKS = (" ", "\n", "\t")
_WHITE_SPACE = " \n\t\r"
_FULL_STOPS = ("。", "！", "？", "।", "།", "។")
_EXTENDING = 16
"characters that a cut without white space may move back, not to part a mark from its letter"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """T tokens of a text, or of its beginning."""

    lead_ids: NDArray[np.int32]
    "tokens of the prefix before the text's first token, which has the end of a prefix that is glued to it"
    prefix_ids: NDArray[np.int32]
    "tokens of the whole prefix, for where the text goes on behind it"
    input_ids: NDArray[np.int32]
    "[T], without <s>, </s> and prefix"
    starts: NDArray[np.int64]
    "[T], code points of the text; the first is 0"
    levels: NDArray[np.uint8]
    "[T], the `Border` before each token"


def read_tokens(text: str, tokenizer: Tokenizer, *, prefix: str = "", enough: int | None = None) -> TextTokens:
    """Tokenise a text in segments; with `enough`, only as far as is needed for more than that many tokens."""
    spans = cut_segments(text)
    ids: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.int64]] = []
    levels: list[NDArray[np.uint8]] = []
    lead_ids = prefix_ids = np.empty(0, np.int32)
    found = 0
    while (enough is None or found <= enough) and (lot := list(islice(spans, 1 if enough else SEGMENTS_TOGETHER))):
        pieces = [text[first:last] if first else prefix + text[:last] for first, last in lot]
        encodings = tokenizer.backend.encode_batch(pieces, add_special_tokens=False)
        for (first, last), encoding in zip(lot, encodings, strict=True):
            mine = np.array(encoding.ids, np.int32)
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + (first - (0 if first else len(prefix)))
            if prefix and not first:
                # A token that reaches past the prefix (the blank before a word is glued to it) is the text's.
                num_lead = int(np.count_nonzero(offsets[:, 1] <= 0))
                lead_ids, mine, offsets = mine[:num_lead], mine[num_lead:], offsets[num_lead:]
                prefix_ids = lead_ids
                if len(offsets) and offsets[0, 0] + len(prefix) < len(prefix.rstrip()):
                    prefix_ids = np.array(tokenizer.backend.encode(prefix, add_special_tokens=False).ids, np.int32)
                offsets = np.maximum(offsets, 0)
            low, high = max(0, first - CONTEXT_CHARS), min(len(text), last + CONTEXT_CHARS)
            ids.append(mine)
            starts.append(offsets[:, 0])
            levels.append(rate_borders(text[low:high], offsets[:, 0] - low, offsets[:, 1] - low))
            found += len(mine)
    joined = np.concatenate(starts)
    joined[:1] = 0
    return TextTokens(
        lead_ids=lead_ids,
        prefix_ids=prefix_ids,
        input_ids=np.concatenate(ids),
        starts=joined,
        levels=np.concatenate(levels),
    )


def cut_segments(text: str) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of the segments of a text, at least one."""
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        stop = _find_cut(text, start, start + SEGMENT_CHARS)
        yield start, stop
        start = stop
    yield start, len(text)


def _find_cut(text: str, start: int, limit: int) -> int:
    """Return the last good place to cut in (start, limit]."""
    blank = max(text.rfind(character, start + 1, limit) for character in _BLANKS)
    if blank > start:
        # One token may stand for a run of blanks; one as long as a segment is cut all the same.
        before = start + len(text[start:blank].rstrip(_WHITE_SPACE))
        return before if before > start else blank
    near = limit - SEGMENT_CHARS // 4
    stop = max(text.rfind(character, near, limit) for character in _FULL_STOPS)
    if stop >= 0:
        return stop + 1
    context = text[limit - _EXTENDING : limit + 1]
    places = np.arange(1, _EXTENDING + 1)
    whole = np.flatnonzero(rate_borders(context, places, places + 1) > 1)
    return limit - _EXTENDING + int(places[whole[-1]]) if len(whole) else limit

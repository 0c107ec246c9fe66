"""The tokens of a text of any size, with their offsets and ratings of the borders before them.

A long text is tokenised in segments of at most SEGMENT_CHARS characters, so time and memory are linear. Segments end
before white space, where the tokens are the same as without segments. A segment without white space (a script without
blanks, joined-up data) ends between two characters, after a full stop if one is near. There the next token may differ.
"""

# ruff: noqa: RUF001  - punctuation of other scripts is meant

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from m3cli.encoder.tokenizer import Tokenizer

SEGMENT_CHARS = 1 << 15
CONTEXT_CHARS = 64
"of text around a segment, for rating its first and last borders"
TOKEN_CHARS = 8
"characters a token, as a rule: limits a segment of a text of which only the beginning is needed"
SPARE_TOKENS = 16
"tokens read in addition, because the last ones of a segment may differ from those of the text"
SEGMENTS_TOGETHER = 32
"tokenised in parallel"
_BLANKS = (" ", "\n", "\t")
_WHITE_SPACE = " \n\t\r"
_SENTENCE_ENDS = ("。", "！", "？", "।", "།", "។")
_EXTENDING = 16
"characters that a cut without white space may move back, to keep a mark with its letter"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """T tokens of a text, or of its beginning."""

    lead_ids: NDArray[np.int32]
    "tokens of the prefix before the text's first token, which may contain the end of the prefix"
    prefix_ids: NDArray[np.int32]
    "tokens of the complete prefix, for chunks after the first"
    input_ids: NDArray[np.int32]
    "[T], without <s>, </s> and prefix"
    starts: NDArray[np.int64]
    "[T], code points of the text; the first is 0"
    levels: NDArray[np.uint8]
    "[T], the `Border` before each token"


class _Reading:
    """A text that is being tokenised, segment by segment."""

    def __init__(self, text: str, *, prefix: str, segment_chars: int) -> None:
        self._text, self._prefix = text, prefix
        self._spans = cut_segments(text, segment_chars=segment_chars)
        self._last = -1
        self._ids: list[NDArray[np.int32]] = []
        self._starts: list[NDArray[np.int64]] = []
        self._levels: list[NDArray[np.uint8]] = []
        self._lead_ids = self._prefix_ids = np.empty(0, np.int32)
        self.num_tokens = 0

    @property
    def ended(self) -> bool:
        return self._last == len(self._text)

    def next_spans(self, count: int) -> list[tuple[int, int]]:
        spans = list(islice(self._spans, count))
        self._last = spans[-1][1]
        return spans

    def segment(self, span: tuple[int, int]) -> str:
        first, last = span
        return self._text[first:last] if first else self._prefix + self._text[:last]

    def add(self, span: tuple[int, int], encoding: Encoding, tokenizer: Tokenizer) -> None:
        first, last = span
        input_ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + (first - (0 if first else len(self._prefix)))
        if self._prefix and not first:
            # A token that reaches past the prefix (a word with the blank before it) belongs to the text.
            num_lead = int(np.count_nonzero(offsets[:, 1] <= 0))
            self._lead_ids, input_ids, offsets = input_ids[:num_lead], input_ids[num_lead:], offsets[num_lead:]
            self._prefix_ids = self._lead_ids
            if len(offsets) and offsets[0, 0] + len(self._prefix) < len(self._prefix.rstrip()):
                encoded = tokenizer.backend.encode(self._prefix, add_special_tokens=False)
                self._prefix_ids = np.array(encoded.ids, np.int32)
            offsets = np.maximum(offsets, 0)
        low, high = max(0, first - CONTEXT_CHARS), min(len(self._text), last + CONTEXT_CHARS)
        self._ids.append(input_ids)
        self._starts.append(offsets[:, 0])
        self._levels.append(rate_borders(self._text[low:high], offsets[:, 0] - low, offsets[:, 1] - low))
        self.num_tokens += len(input_ids)

    def join(self) -> TextTokens:
        starts = np.concatenate(self._starts)
        starts[:1] = 0
        return TextTokens(
            lead_ids=self._lead_ids,
            prefix_ids=self._prefix_ids,
            input_ids=np.concatenate(self._ids),
            starts=starts,
            levels=np.concatenate(self._levels),
        )


def read_texts(
    texts: Iterable[str], tokenizer: Tokenizer, *, prefix: str = "", enough: int | None = None
) -> Iterator[TextTokens]:
    """Yield the tokens of each text, segments of several texts in parallel.

    With `enough`, a text is read only until it has more than that many tokens.
    """
    segment_chars = SEGMENT_CHARS if enough is None else min(SEGMENT_CHARS, TOKEN_CHARS * (enough + SPARE_TOKENS))
    texts = iter(texts)
    while group := [
        _Reading(text, prefix=prefix, segment_chars=segment_chars) for text in islice(texts, SEGMENTS_TOGETHER)
    ]:
        remaining = group
        while remaining:
            count = 1 if enough is not None else max(1, SEGMENTS_TOGETHER // len(remaining))
            spans = [(reading, span) for reading in remaining for span in reading.next_spans(count)]
            segments = [reading.segment(span) for reading, span in spans]
            encodings = tokenizer.backend.encode_batch(segments, add_special_tokens=False)
            for (reading, span), encoding in zip(spans, encodings, strict=True):
                reading.add(span, encoding, tokenizer)
            remaining = [
                reading
                for reading in remaining
                if not reading.ended and (enough is None or reading.num_tokens <= enough + SPARE_TOKENS)
            ]
        yield from (reading.join() for reading in group)


def cut_segments(text: str, *, segment_chars: int) -> Iterator[tuple[int, int]]:
    """Yield the segments [start, stop) of a text, at least one, of at most `segment_chars` each."""
    start = 0
    while len(text) - start > segment_chars:
        stop = _find_cut(text, start, start + segment_chars)
        yield start, stop
        start = stop
    yield start, len(text)


def _find_cut(text: str, start: int, limit: int) -> int:
    """Return the last good place to cut in (start, limit]."""
    blank = max(text.rfind(character, start + 1, limit) for character in _BLANKS)
    if blank > start:
        # Several blanks may be one token; blanks as long as a segment are cut all the same.
        before = start + len(text[start:blank].rstrip(_WHITE_SPACE))
        return before if before > start else blank
    near = limit - (limit - start) // 4
    stop = max(text.rfind(character, near, limit) for character in _SENTENCE_ENDS)
    if stop >= 0:
        return stop + 1
    context = text[limit - _EXTENDING : limit + 1]
    offsets = np.arange(1, _EXTENDING + 1)
    good = np.flatnonzero(rate_borders(context, offsets, offsets + 1) > Border.GRAPHEME)
    return limit - _EXTENDING + int(offsets[good[-1]]) if len(good) else limit


class Border(IntEnum):
    """Rating of the border between two tokens; a higher one is a better place to cut."""

    CHARACTER = 0
    "inside a code point that became several tokens"
    GRAPHEME = 1
    "inside a grapheme, which a reader sees as one character"
    INSIDE_WORD = 2
    WORD = 3
    LINE = 4
    SENTENCE = 5
    PARAGRAPH = 6


def _codes(characters: str) -> NDArray[np.uint32]:
    return np.frombuffer(characters.encode("utf-32-le"), np.uint32)


_STOPS = _codes(".!?…؟۔։‼⁇⁈⁉")
"end a sentence if white space follows"
_FULL_STOPS = _codes("。！？｡．।॥።፧။៕།༎")
"end a sentence without white space"
_PAUSES = _codes("，、；：､፣፤،")
"end a phrase without white space"
_CLOSERS = _codes("\"'’”»)]}」』）】》〉〕｣")
_JOINER = 0x200D
_REGIONAL = (0x1F1E6, 0x1F1FF)
_LEADING_JAMO = (0x1100, 0x115F)
_SYLLABLES = (0xAC00, 0xD7A3)
_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)
_MORE_EXTENDING = frozenset("\u200c\u200d\u0e33\u0eb3")
"joiners, and the vowels am of Thai and Lao"


def rate_borders(text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Rate the border before each token.

    Args:
        text: code points of the tokens, and a few before and after them as context.
        starts: [T] first code point of each token, ascending.
        ends: [T] code point after each token.

    Returns:
        [T] a `Border` each; the first one as if a token ended before it.
    """
    if not len(starts):
        return np.empty(0, np.uint8)
    codes = _codes(text)
    space = np.isin(codes, _SPACES)
    at = np.minimum(starts, len(codes) - 1)
    indices = np.arange(len(codes))
    # The white space around a border is [left + 1, right).
    left = np.concatenate(([-1], np.maximum.accumulate(np.where(space, -1, indices))))[at]
    right = np.minimum.accumulate(np.where(space, len(codes), indices)[::-1])[::-1][at]
    has_space = right - left > 1
    breaks = np.concatenate(([0], np.cumsum(codes == ord("\n"))))
    num_breaks = breaks[right] - breaks[left + 1]
    levels = np.full(len(starts), Border.INSIDE_WORD, np.uint8)
    word = has_space | np.isin(codes[left], _PAUSES)
    levels[word] = Border.WORD
    levels[num_breaks == 1] = Border.LINE
    levels[_ends_sentence(codes, space, left, right)] = Border.SENTENCE
    levels[num_breaks > 1] = Border.PARAGRAPH
    levels[_splits_grapheme(codes, at)] = Border.GRAPHEME
    shared = np.concatenate(([False], (starts[1:] < ends[:-1]) | (starts[1:] <= starts[:-1])))
    levels[shared] = Border.CHARACTER
    return levels


def _ends_sentence(
    codes: NDArray[np.uint32], space: NDArray[np.bool_], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether a sentence ends at a border: in the last character before it and before closing quotes."""
    indices = np.arange(len(codes))
    closes = np.isin(codes, _CLOSERS)
    last = np.maximum.accumulate(np.where(space | closes, -1, indices))[left]
    ender, follower = codes[last], codes[np.minimum(right, len(codes) - 1)]
    has_space = right - left > 1
    lower = _ask(follower, str.islower)
    ends = (np.isin(ender, _STOPS) & has_space & ~lower) | (
        np.isin(ender, _FULL_STOPS) & ~np.isin(follower, np.concatenate((_CLOSERS, _FULL_STOPS)))
    )
    found: NDArray[np.bool_] = ends & (last >= 0) & (left >= 0)
    return found


def _splits_grapheme(codes: NDArray[np.uint32], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether the characters before and at an index form one grapheme."""
    here, before = codes[at], codes[np.maximum(at - 1, 0)]
    flags = _within(here, *_REGIONAL) & _within(before, *_REGIONAL)
    line_end = (here == ord("\n")) & (before == ord("\r"))
    conjunct = _ask(before, _is_virama) & _ask(here, str.isalpha)
    syllable = _within(before, *_LEADING_JAMO) & (_within(here, *_LEADING_JAMO) | _within(here, *_SYLLABLES))
    split: NDArray[np.bool_] = _ask(here, _extends) | (before == _JOINER) | flags | line_end | conjunct | syllable
    return split & (at > 0)


def _within(codes: NDArray[np.uint32], first: int, last: int) -> NDArray[np.bool_]:
    return (codes >= first) & (codes <= last)


def _ask(codes: NDArray[np.uint32], question: Callable[[str], bool]) -> NDArray[np.bool_]:
    """Return the answer for each code point, with one call for each distinct one."""
    unique, inverse = np.unique(codes, return_inverse=True)
    answers = np.array([question(chr(code)) for code in unique.tolist()], np.bool_)
    found: NDArray[np.bool_] = answers[inverse.reshape(-1)]
    return found


@lru_cache(maxsize=1 << 14)
def _extends(character: str) -> bool:
    """Return whether a character extends the one before it: marks, joiners, skin tones, tags, later jamo of Hangul."""
    code = ord(character)
    return (
        unicodedata.category(character) in ("Mn", "Me", "Mc")
        or character in _MORE_EXTENDING
        or 0x1F3FB <= code <= 0x1F3FF
        or 0xE0020 <= code <= 0xE007F
        or 0x1160 <= code <= 0x11FF
        or 0xD7B0 <= code <= 0xD7FB
    )


@lru_cache(maxsize=1 << 14)
def _is_virama(character: str) -> bool:
    return unicodedata.combining(character) == 9

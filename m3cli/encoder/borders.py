"""How good a place between two tokens is to cut a text: a level for each border, from a character to a paragraph.

Vectorised over the tokens of a piece of text, nothing is looked at twice, so it is linear in the text. The rules are
those of Unicode text segmentation as far as a cut needs them (UAX 29: combining marks, joiners, jamo, flags, Indic
conjuncts stay with what is before them) and of the full stops of many scripts; those of CJK, Indic, Ethiopic, Khmer and
Tibetan need no blank after them.
"""

# ruff: noqa: RUF001  - punctuation of other scripts is meant

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Border(IntEnum):
    """What a border between two tokens is; more is better to cut at."""

    CHARACTER = 0
    "inside one code point of the text, which became several tokens"
    GRAPHEME = 1
    "inside what a reader takes for one character"
    INSIDE_WORD = 2
    WORD = 3
    LINE = 4
    SENTENCE = 5
    PARAGRAPH = 6


def _codes(characters: str) -> NDArray[np.uint32]:
    return np.frombuffer(characters.encode("utf-32-le"), np.uint32)


_STOPS = _codes(".!?…؟۔։‼⁇⁈⁉")
"that end a sentence where white space follows"
_FULL_STOPS = _codes("。！？｡．।॥።፧။៕།༎")
"that end a sentence by themselves"
_PAUSES = _codes("，、；：､፣፤،")
"that end a phrase by themselves"
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
        text: L code points, in which a few before the first token's and after the last token's are context.
        starts: [T] where tokens begin in `text`, ascending.
        ends: [T] where they end.

    Returns:
        [T] a `Border` each; for the first token as if another one had ended before it.
    """
    if not len(starts):
        return np.empty(0, np.uint8)
    codes = _codes(text)
    space = np.isin(codes, _SPACES)
    at = np.minimum(starts, len(codes) - 1)
    places = np.arange(len(codes))
    # The white space around a border is [left + 1, right): after the last character before it, up to the one behind it.
    left = np.concatenate(([-1], np.maximum.accumulate(np.where(space, -1, places))))[at]
    right = np.minimum.accumulate(np.where(space, len(codes), places)[::-1])[::-1][at]
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
    """Whether a sentence ends in the last character before a border, or before the closing quotes there."""
    places = np.arange(len(codes))
    closes = np.isin(codes, _CLOSERS)
    last = np.maximum.accumulate(np.where(space | closes, -1, places))[left]
    ender, follower = codes[last], codes[np.minimum(right, len(codes) - 1)]
    has_space = right - left > 1
    lower = _ask(follower, str.islower)
    ends = (np.isin(ender, _STOPS) & has_space & ~lower) | (
        np.isin(ender, _FULL_STOPS) & ~np.isin(follower, np.concatenate((_CLOSERS, _FULL_STOPS)))
    )
    found: NDArray[np.bool_] = ends & (last >= 0) & (left >= 0)
    return found


def _splits_grapheme(codes: NDArray[np.uint32], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the characters before and at a place are one for a reader."""
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
    """Ask something of each code point, once for each that there is."""
    unique, inverse = np.unique(codes, return_inverse=True)
    answers = np.array([question(chr(code)) for code in unique.tolist()], np.bool_)
    found: NDArray[np.bool_] = answers[inverse.reshape(-1)]
    return found


@lru_cache(maxsize=1 << 14)
def _extends(character: str) -> bool:
    """Whether a character is part of the one before it: marks, joiners, skin tones, tags, later jamo of Hangul."""
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

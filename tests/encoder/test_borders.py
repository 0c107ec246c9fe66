from __future__ import annotations

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.segments import Border, rate_borders


def rate(text: str) -> list[int]:
    """Rate the border before every code point."""
    places = np.arange(len(text))
    return [int(level) for level in rate_borders(text, places, places + 1)]


@pytest.mark.parametrize(
    ("text", "place", "level"),
    [
        ("abc", 1, Border.INSIDE_WORD),
        ("ab cd", 3, Border.WORD),
        ("ab\ncd", 3, Border.LINE),
        ("ab\n\ncd", 4, Border.PARAGRAPH),
        ("ab\r\n\r\ncd", 6, Border.PARAGRAPH),
        ("ab \n \n cd", 7, Border.PARAGRAPH),
        ("Ab. Cd", 4, Border.SENTENCE),
        ("e.g. this", 5, Border.WORD),
        ("v1.2", 3, Border.INSIDE_WORD),
        ('"Ab." Cd', 6, Border.SENTENCE),
        ("Да! Нет", 4, Border.SENTENCE),
        ("こう考えた。智に", 6, Border.SENTENCE),
        ("「考えた。」智に", 6, Border.SENTENCE),
        ("「考えた。」智に", 5, Border.INSIDE_WORD),
        ("登りながら、こう", 6, Border.WORD),
        ("वाक्य है। यह", 10, Border.SENTENCE),
        ("e\u0301x", 1, Border.GRAPHEME),
        ("👩\u200d👧", 1, Border.GRAPHEME),
        ("👩\u200d👧", 2, Border.GRAPHEME),
        ("👍🏽", 1, Border.GRAPHEME),
        ("🇩🇪", 1, Border.GRAPHEME),
        ("\r\n", 1, Border.GRAPHEME),
        ("ที่นี่", 1, Border.GRAPHEME),
        ("\u1112\u1161\u11ab", 2, Border.GRAPHEME),
    ],
)
def test_borders_have_their_levels(text: str, place: int, level: Border) -> None:
    assert rate(text)[place] == level


def test_tokens_of_one_character_share_it() -> None:
    starts, ends = np.array([0, 1, 1, 1]), np.array([1, 2, 2, 2])
    assert rate_borders("a﷽", starts, ends).tolist()[2:] == [Border.CHARACTER, Border.CHARACTER]


CHARACTERS = "ab .\n\r\u0301é語。한\u1112\u1161\u11abनमस्ते🇩🇪🇫👩👧👍🏽\u200d\ufe0fที่ำ\u0639\u0651"


def is_written(text: str) -> bool:
    """Whether no virama carries a further mark, which no orthography has, and of which we would not know."""
    return not regex.search("\u094d[\\p{M}\u200d\ufe0f\U0001f3fb-\U0001f3ff]", text)


@given(st.text(st.sampled_from(CHARACTERS), max_size=40).filter(is_written))
def test_no_border_of_words_is_inside_a_grapheme(text: str) -> None:
    found = rate(text)
    borders = {match.start() for match in regex.finditer(r"\X", text)}
    inside = [place for place in range(1, len(text)) if place not in borders]
    assert all(found[place] == Border.GRAPHEME for place in inside)

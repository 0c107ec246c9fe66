from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Encoding

from m3cli.encoder import tokenizer as segments
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.tokenizer import (
    Border,
    TextTokens,
    Tokenizer,
    cut_segments,
    load_tokenizer,
    rate_borders,
    read_texts,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_m3: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(tiny_m3))


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_CHARS", 64)


def read_tokens(text: str, tokenizer: Tokenizer, *, prefix: str = "", enough: int | None = None) -> TextTokens:
    (tokens,) = read_texts([text], tokenizer, prefix=prefix, enough=enough)
    return tokens


def encode_whole(text: str, tokenizer: Tokenizer) -> Encoding:
    """The tokens of one text at once, without <s> and </s>."""
    return tokenizer.backend.encode(text, add_special_tokens=False)


WORDS = st.lists(st.sampled_from(["alpha", "мир", "日本語", "e\u0301", "<mask>", "\u0301", "Ω.", "㍿"]), max_size=80)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS, blanks=st.lists(st.sampled_from([" ", "\n", "\r\n", "  ", "\t"]), min_size=80, max_size=80))
def test_segments_at_white_space_have_the_tokens_of_the_whole_text(
    tokenizer: Tokenizer, short_segments: None, words: list[str], blanks: list[str]
) -> None:
    text = "".join(word + blank for word, blank in zip(words, blanks, strict=False))
    found = read_tokens(text, tokenizer)
    complete = encode_whole(text, tokenizer)
    assert found.input_ids.tolist() == complete.ids
    assert found.starts[1:].tolist() == [first for first, _ in complete.offsets][1:]


def test_a_run_of_blanks_is_not_parted(tokenizer: Tokenizer, short_segments: None) -> None:
    text = "alpha " * 10 + "mu  <mask> omega\r\n \tend " * 8
    found, complete = read_tokens(text, tokenizer), encode_whole(text, tokenizer)
    assert found.input_ids.tolist() == complete.ids
    assert found.starts[1:].tolist() == [first for first, _ in complete.offsets][1:]


def test_blanks_that_fill_segments_are_cut_all_the_same(short_segments: None) -> None:
    spans = list(cut_segments("a" + " " * 300 + "b", segment_chars=64))
    assert spans[-1][1] == 302
    assert all(0 < stop - start <= 64 for start, stop in spans)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab 語。\n\u0301🇩🇪"), max_size=500))
def test_segments_tile_a_text(short_segments: None, text: str) -> None:
    spans = list(cut_segments(text, segment_chars=64))
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert all(0 < stop - start <= 64 for start, stop in spans) or not text


def test_without_white_space_only_tokens_at_the_cuts_may_differ(tokenizer: Tokenizer, short_segments: None) -> None:
    text = "山路を登りながらこう考えた智に働けば角が立つ情に棹させば流される" * 20
    found, complete = read_tokens(text, tokenizer), encode_whole(text, tokenizer)
    joined = [tokenizer.token(token).replace("▁", "") for token in found.input_ids.tolist()]
    assert "".join(joined) == text
    cuts = len(list(cut_segments(text, segment_chars=64))) - 1
    indices = {first for first, _ in complete.offsets}
    assert len(set(found.starts.tolist()) - indices) <= 2 * cuts


def test_enough_tokens_are_read_and_no_more(tokenizer: Tokenizer) -> None:
    text = "some words of a book. " * 20_000
    found = read_tokens(text, tokenizer, enough=100)
    assert 100 < len(found.input_ids) < 20_000
    blank = read_tokens(" " * 200_000 + "end of it", tokenizer, enough=2)
    assert len(blank.input_ids) == 3


def test_several_texts_come_in_their_order_as_each_would_alone(tokenizer: Tokenizer, short_segments: None) -> None:
    texts = ["alpha beta " * count for count in (1, 70, 3, 200, *range(40))]
    for enough in (None, 20):
        found = list(read_texts(iter(texts), tokenizer, enough=enough))
        assert len(found) == len(texts)
        for text, tokens in zip(texts, found, strict=True):
            alone = read_tokens(text, tokenizer, enough=enough)
            assert tokens.input_ids.tolist() == alone.input_ids.tolist()
            assert tokens.starts.tolist() == alone.starts.tolist()
            assert tokens.levels.tolist() == alone.levels.tolist()


def test_a_prefix_is_apart_and_offsets_are_of_the_text(tokenizer: Tokenizer, short_segments: None) -> None:
    text = "alpha beta gamma delta " * 20
    found = read_tokens(text, tokenizer, prefix="query: ")
    assert found.prefix_ids.tolist() == tokenizer.encode(["query:"])[0].tolist()[1:-1]
    assert found.input_ids.tolist() == encode_whole(text, tokenizer).ids
    assert found.starts[0] == 0
    assert (np.diff(found.starts) >= 0).all()


def rate(text: str) -> list[int]:
    """Rate the border before every code point."""
    indices = np.arange(len(text))
    return [int(level) for level in rate_borders(text, indices, indices + 1)]


@pytest.mark.parametrize(
    ("text", "index", "level"),
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
def test_borders_have_their_levels(text: str, index: int, level: Border) -> None:
    assert rate(text)[index] == level


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
    inside = [index for index in range(1, len(text)) if index not in borders]
    assert all(found[index] == Border.GRAPHEME for index in inside)

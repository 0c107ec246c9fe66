from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.config import Split
from m3cli.encoder.chunker import REACH_PART, Window, cut_windows
from m3cli.encoder.segments import Border
from m3cli.errors import UsageError

PLAIN = st.lists(st.integers(Border.INSIDE_WORD, Border.PARAGRAPH), max_size=400)
ROUGH = st.lists(st.sampled_from([0, 0, 1, 2, 3, 5]), max_size=400)


def cut(levels: list[int], *, size: int, overlap: int = 0, split: Split = "tokens") -> list[Window]:
    return cut_windows(np.array(levels, np.uint8), size=size, overlap=overlap, split=split)


def spans(windows: list[Window]) -> list[tuple[int, int]]:
    return [(window.start, window.stop) for window in windows]


def check_cover(windows: list[Window], *, num_tokens: int, size: int) -> None:
    assert windows[0].start == 0
    assert windows[-1].stop == num_tokens
    assert all(window.stop - window.start <= size for window in windows)
    for before, after in pairwise(windows):
        assert before.start < after.start <= before.stop < after.stop
        assert after.repeated == before.stop - after.start


def test_windows_of_tokens_are_full_and_tile() -> None:
    assert spans(cut([3] * 10, size=4)) == [(0, 4), (4, 8), (8, 10)]


def test_windows_of_tokens_repeat_exactly_the_overlap() -> None:
    assert spans(cut([3] * 10, size=4, overlap=1)) == [(0, 4), (3, 7), (6, 10)]


def test_the_best_border_in_reach_is_taken_and_the_nearest_of_equals() -> None:
    levels = [int(Border.WORD)] * 100
    levels[45] = levels[52] = Border.SENTENCE
    assert spans(cut(levels, size=80, split="sentence")) == [(0, 52), (52, 100)]
    levels[44] = Border.PARAGRAPH
    assert spans(cut(levels, size=80, split="sentence")) == [(0, 44), (44, 100)]


def test_the_last_window_is_no_sliver() -> None:
    assert spans(cut([3] * 81, size=80, split="sentence")) == [(0, 41), (41, 81)]


def test_the_first_window_holds_what_the_second_repeats() -> None:
    assert spans(cut([2] * 9, size=8, overlap=4, split="sentence")) == [(0, 7), (3, 9)]


def test_a_cut_inside_a_character_moves_to_its_border() -> None:
    assert spans(cut([3, 3, 3, 0, 0, 3, 3], size=4)) == [(0, 2), (2, 6), (6, 7)]


def test_characters_that_fit_no_window_are_cut_all_the_same() -> None:
    assert spans(cut([3, 0, 0, 0, 0], size=2)) == [(0, 2), (2, 4), (4, 5)]


@given(PLAIN, st.integers(1, 60), st.integers(0, 59))
def test_tokens_cover_all_with_the_overlap_stated(levels: list[int], size: int, overlap: int) -> None:
    if overlap >= size:
        with pytest.raises(UsageError, match=f"--overlap {overlap}"):
            cut(levels, size=size, overlap=overlap)
        return
    windows = cut(levels, size=size, overlap=overlap)
    check_cover(windows, num_tokens=len(levels), size=size)
    assert all(window.repeated == overlap for window in windows[1:])
    assert all(window.stop - window.start == size for window in windows[:-1])


@given(PLAIN, st.integers(8, 80), st.integers(0, 40))
def test_sentences_overlap_within_reach_and_balance(levels: list[int], size: int, overlap: int) -> None:
    overlap = min(overlap, size - 1)
    reach = (size - overlap) // REACH_PART
    windows = cut(levels, size=size, overlap=overlap, split="sentence")
    check_cover(windows, num_tokens=len(levels), size=size)
    for window in windows[1:]:
        assert overlap <= window.repeated <= (overlap + reach if overlap else 0)
    new = [window.stop - window.start - window.repeated for window in windows]
    if len(windows) > 1:
        assert min(new) >= (size - overlap) // 2 - 2 * reach


@given(ROUGH, st.integers(1, 40), st.integers(0, 10), st.sampled_from(["tokens", "sentence"]))
def test_whatever_the_borders_all_is_covered_and_nothing_over_the_limit(
    levels: list[int], size: int, overlap: int, split: Split
) -> None:
    windows = cut(levels, size=size, overlap=min(overlap, size - 1), split=split)
    check_cover(windows, num_tokens=len(levels), size=size)


@given(ROUGH, st.integers(16, 40))
def test_characters_that_fit_are_never_cut(levels: list[int], size: int) -> None:
    longest = max(map(len, "".join("x" if level < 2 else " " for level in levels).split()), default=0)
    if longest >= size // 2:
        return
    for split in ("tokens", "sentence"):
        windows = cut(levels, size=size, overlap=0, split=split)
        assert all(levels[window.start] >= Border.INSIDE_WORD for window in windows[1:])

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.config import Split
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import REACH_PART, Cutting, Window, chunk_documents, cut_windows
from m3cli.encoder.tokenizer import Border, Tokenizer, load_tokenizer
from m3cli.errors import UsageError
from m3cli.records import Chunks, Document
from tests.conftest import build_sample


@pytest.fixture(scope="module")
def tokenizer(tiny_m3: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(tiny_m3))


def as_documents(*texts: str) -> list[Document]:
    return [
        Document(id=str(i), text=text, text_hash=(0, 0), has_own_id=True, position=i) for i, text in enumerate(texts)
    ]


def row_ids(chunks: Chunks) -> list[list[int]]:
    return [chunks.input_ids[a:b].tolist() for a, b in pairwise(chunks.cu_seqlens)]


def test_model_cards_sentence_has_its_known_ids(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents(as_documents("What is BGE M3?"), tokenizer, Cutting(max_length=8192))
    assert row_ids(chunks) == [[0, 4865, 83, 335, 11679, 276, 363, 32, 2]]
    assert (chunks.char_start[0], chunks.char_end[0]) == (0, 15)


def test_short_documents_are_one_row_each_in_order(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents(as_documents("one", "два", "三"), tokenizer, Cutting(max_length=16))
    assert chunks.document.tolist() == [0, 1, 2]
    assert chunks.num_chunks.tolist() == [1, 1, 1]
    assert chunks.char_end.tolist() == [3, 3, 1]
    assert not chunks.truncated.any()


def test_no_documents_give_no_rows(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents([], tokenizer, Cutting(max_length=16))
    assert chunks.num_rows == 0
    assert chunks.cu_seqlens.tolist() == [0]


TEXTS = st.text(st.sampled_from("ab cde 語日本 мир \ńé\u200b🙂 .,"), min_size=1, max_size=300).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, max_length=st.integers(5, 40), overlap=st.integers(0, 2))
def test_long_documents_spans_and_ids(tokenizer: Tokenizer, text: str, max_length: int, overlap: int) -> None:
    chunks = chunk_documents(
        as_documents(text), tokenizer, Cutting(max_length=max_length, overlap=overlap, split="tokens")
    )
    assert (chunks.num_tokens <= max_length).all()
    assert chunks.chunk_index.tolist() == list(range(chunks.num_rows))
    assert set(chunks.num_chunks.tolist()) == {chunks.num_rows}
    assert chunks.char_start[0] == 0
    assert chunks.char_end[-1] == len(text)
    if overlap == 0:
        assert chunks.char_start[1:].tolist() == chunks.char_end[:-1].tolist()
    else:
        assert (chunks.char_start[1:] <= chunks.char_end[:-1]).all()
    complete = tokenizer.encode([text])[0].tolist()
    bodies = [ids[1:-1] for ids in row_ids(chunks)]
    joined = [
        token for body, repeated in zip(bodies, chunks.num_repeated, strict=True) for token in body[int(repeated) :]
    ]
    assert joined == complete[1:-1]


def test_truncate_keeps_the_first_window_and_says_so(tokenizer: Tokenizer) -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    chunks = chunk_documents(as_documents(text, "short"), tokenizer, Cutting(max_length=6, long_docs="truncate"))
    assert chunks.truncated.tolist() == [True, False]
    assert chunks.num_chunks.tolist() == [1, 1]
    assert chunks.num_tokens[0] == 6
    assert 0 < chunks.char_end[0] < len(text)
    assert row_ids(chunks)[0][:-1] == tokenizer.encode([text])[0].tolist()[:5]


def test_prefix_goes_before_every_chunk_and_not_into_offsets(tokenizer: Tokenizer) -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    chunks = chunk_documents(as_documents(text), tokenizer, Cutting(max_length=9, prefix="query: "))
    prefix = tokenizer.encode(["query:"])[0].tolist()[1:-1]
    assert chunks.num_rows > 1
    for ids in row_ids(chunks):
        assert len(ids) <= 9
        assert ids[1 : 1 + len(prefix)] == prefix
    assert chunks.char_start[0] == 0
    assert chunks.char_end[-1] == len(text)
    assert chunks.char_start[1:].tolist() == chunks.char_end[:-1].tolist()
    joint = tokenizer.encode(["query: " + text])[0].tolist()
    assert [*prefix, *(token for ids in row_ids(chunks) for token in ids[1 + len(prefix) : -1])] == joint[1:-1]


@pytest.mark.parametrize("prefix", ["query: ", "query:", "re", "passage：", "Represent this: re"])  # noqa: RUF001
def test_every_chunk_has_the_tokens_of_prefix_and_its_text(tokenizer: Tokenizer, prefix: str) -> None:
    text = "search the old books of " * 20
    chunks = chunk_documents(as_documents(text), tokenizer, Cutting(max_length=20, prefix=prefix))
    assert chunks.num_rows > 5
    for ids, start, end in zip(row_ids(chunks), chunks.char_start, chunks.char_end, strict=True):
        assert len(ids) <= 20
        blank = " " if start else ""  # that the text has before a word, and no chunk's span
        assert ids == tokenizer.encode([prefix + blank + text[start:end]])[0].tolist()


def test_prefix_longer_than_a_chunk_is_a_usage_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="--prefix"):
        chunk_documents(
            as_documents("some text that is long"), tokenizer, Cutting(max_length=5, prefix="a b c d e f g ")
        )


def test_ids_are_int32_and_offsets_int64(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents(as_documents("x"), tokenizer, Cutting(max_length=5))
    assert chunks.input_ids.dtype == np.int32
    assert chunks.char_start.dtype == chunks.cu_seqlens.dtype == np.int64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, max_length=st.integers(10, 40), overlap=st.integers(0, 3))
def test_sentences_tile_the_text_and_keep_its_tokens(
    tokenizer: Tokenizer, text: str, max_length: int, overlap: int
) -> None:
    chunks = chunk_documents(as_documents(text), tokenizer, Cutting(max_length=max_length, overlap=overlap))
    assert (chunks.num_tokens <= max_length).all()
    assert (chunks.char_start[0], chunks.char_end[-1]) == (0, len(text))
    assert (chunks.char_start[1:] <= chunks.char_end[:-1]).all()
    if not overlap:
        spans = zip(chunks.char_start.tolist(), chunks.char_end.tolist(), strict=True)
        assert "".join(text[start:stop] for start, stop in spans) == text
    bodies = zip(row_ids(chunks), chunks.num_repeated.tolist(), strict=True)
    assert [token for ids, repeated in bodies for token in ids[1 + repeated : -1]] == tokenizer.encode([text])[
        0
    ].tolist()[1:-1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, max_length=st.integers(10, 40))
def test_a_chunk_cut_at_white_space_has_the_tokens_of_its_text_alone(
    tokenizer: Tokenizer, text: str, max_length: int
) -> None:
    chunks = chunk_documents(as_documents(text), tokenizer, Cutting(max_length=max_length))
    for ids, start, stop in zip(row_ids(chunks), chunks.char_start.tolist(), chunks.char_end.tolist(), strict=True):
        before, last = text[start - 1 : start], text[stop - 1 : stop]
        if (not before or before.isspace()) and (stop == len(text) or last.isspace()):
            assert ids == tokenizer.encode([text[start:stop]])[0].tolist()


def test_texts_longer_than_a_segment_are_cut_like_others(tokenizer: Tokenizer) -> None:
    sentence = "A book has many sentences, and each of them says something. "
    text = sentence * 2000
    chunks = chunk_documents(as_documents("short", text, "short too"), tokenizer, Cutting(max_length=512))
    assert chunks.document[0] == 0
    assert chunks.document[-1] == 2
    rows = chunks.document == 1
    assert "".join(text[a:b] for a, b in zip(chunks.char_start[rows], chunks.char_end[rows], strict=True)) == text
    assert (chunks.char_start[rows] % len(sentence) == 0).all()
    assert chunks.num_tokens[rows].min() > 0.7 * chunks.num_tokens[rows].max()
    cut = chunk_documents(as_documents(text), tokenizer, Cutting(max_length=512, long_docs="truncate"))
    assert cut.num_tokens.tolist() == [512]
    assert cut.truncated.tolist() == [True]


def test_a_long_text_of_few_tokens_is_one_row(tokenizer: Tokenizer) -> None:
    text = "end" + " " * 100_000 + "of it"
    for long_docs in ("chunk", "truncate"):
        cutting = Cutting(max_length=16, long_docs=long_docs)
        chunks = chunk_documents(as_documents(text), tokenizer, cutting)
        assert chunks.num_chunks.tolist() == [1]
        assert chunks.char_end.tolist() == [len(text)]
        assert not chunks.truncated.any()


def test_the_prefix_of_later_chunks_counts_as_repeated(tokenizer: Tokenizer) -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    chunks = chunk_documents(
        as_documents(text), tokenizer, Cutting(max_length=12, overlap=2, prefix="query: ", split="tokens")
    )
    prefix = len(tokenizer.encode(["query:"])[0]) - 2
    assert chunks.num_repeated.tolist() == [0] + [prefix + 2] * (chunks.num_rows - 1)


def count_other_tokens(text: str, tokenizer: Tokenizer, cutting: Cutting) -> Iterator[tuple[bool, int]]:
    """Of each chunk but the first yield whether it begins at white space, and how many tokens its text alone changes.

    Tokens are counted up to the last that is another one.
    """
    chunks = chunk_documents(as_documents(text), tokenizer, cutting)
    spans = list(zip(chunks.char_start.tolist(), chunks.char_end.tolist(), strict=True))
    alone = tokenizer.encode([text[start:end] for start, end in spans])
    for (start, _), part, other in list(zip(spans, row_ids(chunks), alone, strict=True))[1:]:
        own, theirs = part[1:], other.tolist()[1:]
        pairs = zip(reversed(own), reversed(theirs), strict=False)
        equal = next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(own), len(theirs)))
        yield text[start - 1].isspace() or text[start].isspace(), max(len(own), len(theirs)) - equal


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, max_length=st.integers(5, 40), split=st.sampled_from(["tokens", "sentence"]))
def test_a_chunk_that_begins_at_white_space_has_the_tokens_of_its_text(
    tokenizer: Tokenizer, text: str, max_length: int, split: Split
) -> None:
    found = count_other_tokens(text, tokenizer, Cutting(max_length=max_length, split=split))
    assert all(number == 0 for at_blank, number in found if at_blank)


@pytest.mark.parametrize("lang", ["zh", "ja", "th", "en"])
def test_a_chunk_that_begins_inside_a_word_differs_in_its_first_tokens_at_most(tokenizer: Tokenizer, lang: str) -> None:
    rows = map(json.loads, build_sample().read_text(encoding="utf-8").splitlines())
    text = " ".join(row["text"] for row in rows if row["lang"] == lang)
    cuttings = [Cutting(max_length=length, split=split) for length in (16, 33, 64) for split in ("tokens", "sentence")]
    found = [each for cutting in cuttings for each in count_other_tokens(text, tokenizer, cutting)]
    assert not any(number for at_blank, number in found if at_blank)
    inside = np.array([number for at_blank, number in found if not at_blank])
    assert len(inside) > 20
    assert inside.max() <= 4
    assert (inside > 1).mean() < (0.1 if lang == "en" else 0.05)


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

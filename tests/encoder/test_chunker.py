from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.chunker import chunk_documents, cut_windows
from m3cli.encoder.tokenizer import Tokenizer, load_tokenizer
from m3cli.errors import UsageError
from m3cli.records import Chunks, Document


@pytest.fixture(scope="module")
def tokenizer(tiny_m3: Path) -> Tokenizer:
    return load_tokenizer(read_checkpoint(tiny_m3))


def as_documents(*texts: str) -> list[Document]:
    return [
        Document(id=str(i), text=text, text_hash=(0, 0), has_own_id=True, position=i) for i, text in enumerate(texts)
    ]


def row_ids(chunks: Chunks) -> list[list[int]]:
    return [chunks.input_ids[a:b].tolist() for a, b in pairwise(chunks.cu_seqlens)]


def test_windows_without_overlap_tile_the_tokens() -> None:
    assert cut_windows(10, size=4, overlap=0) == [(0, 4), (4, 8), (8, 10)]


def test_windows_repeat_exactly_the_overlap() -> None:
    assert cut_windows(10, size=4, overlap=1) == [(0, 4), (3, 7), (6, 10)]


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 59))
def test_windows_cover_everything_and_end_once(num_tokens: int, size: int, overlap: int) -> None:
    if overlap >= size:
        with pytest.raises(UsageError, match=f"--overlap {overlap}"):
            cut_windows(num_tokens, size=size, overlap=overlap)
        return
    windows = cut_windows(num_tokens, size=size, overlap=overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == num_tokens
    assert sum(stop == num_tokens for _, stop in windows) == 1
    assert all(0 < stop - start <= size for start, stop in windows)
    assert all(after[0] == before[1] - overlap for before, after in pairwise(windows))


def test_model_cards_sentence_has_its_known_ids(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents(as_documents("What is BGE M3?"), tokenizer, max_length=8192)
    assert row_ids(chunks) == [[0, 4865, 83, 335, 11679, 276, 363, 32, 2]]
    assert (chunks.char_start[0], chunks.char_end[0]) == (0, 15)


def test_short_documents_are_one_row_each_in_order(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents(as_documents("one", "два", "三"), tokenizer, max_length=16)
    assert chunks.document.tolist() == [0, 1, 2]
    assert chunks.num_chunks.tolist() == [1, 1, 1]
    assert chunks.char_end.tolist() == [3, 3, 1]
    assert not chunks.truncated.any()


def test_no_documents_give_no_rows(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents([], tokenizer, max_length=16)
    assert chunks.num_rows == 0
    assert chunks.cu_seqlens.tolist() == [0]


TEXTS = st.text(st.sampled_from("ab cde 語日本 мир \ńé\u200b🙂 .,"), min_size=1, max_size=300).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, max_length=st.integers(5, 40), overlap=st.integers(0, 2))
def test_long_documents_spans_and_ids(tokenizer: Tokenizer, text: str, max_length: int, overlap: int) -> None:
    chunks = chunk_documents(as_documents(text), tokenizer, max_length=max_length, overlap=overlap)
    assert (chunks.num_tokens <= max_length).all()
    assert chunks.chunk_index.tolist() == list(range(chunks.num_rows))
    assert set(chunks.num_chunks.tolist()) == {chunks.num_rows}
    assert chunks.char_start[0] == 0
    assert chunks.char_end[-1] == len(text)
    if overlap == 0:
        assert chunks.char_start[1:].tolist() == chunks.char_end[:-1].tolist()
    else:
        assert (chunks.char_start[1:] <= chunks.char_end[:-1]).all()
    whole = tokenizer.encode([text])[0].tolist()
    bodies = [ids[1:-1] for ids in row_ids(chunks)]
    joined = bodies[0] + [token for body in bodies[1:] for token in body[overlap:]]
    assert joined == whole[1:-1]


def test_truncate_keeps_the_first_window_and_says_so(tokenizer: Tokenizer) -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    chunks = chunk_documents(as_documents(text, "short"), tokenizer, max_length=6, long_docs="truncate")
    assert chunks.truncated.tolist() == [True, False]
    assert chunks.num_chunks.tolist() == [1, 1]
    assert chunks.num_tokens[0] == 6
    assert 0 < chunks.char_end[0] < len(text)
    assert row_ids(chunks)[0][:-1] == tokenizer.encode([text])[0].tolist()[:5]


def test_prefix_goes_before_every_chunk_and_not_into_offsets(tokenizer: Tokenizer) -> None:
    text = "alpha beta gamma delta epsilon zeta eta theta"
    chunks = chunk_documents(as_documents(text), tokenizer, max_length=9, prefix="query: ")
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


def test_prefix_longer_than_a_chunk_is_a_usage_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="--prefix"):
        chunk_documents(as_documents("some text that is long"), tokenizer, max_length=5, prefix="a b c d e f g ")


def test_ids_are_int32_and_offsets_int64(tokenizer: Tokenizer) -> None:
    chunks = chunk_documents(as_documents("x"), tokenizer, max_length=5)
    assert chunks.input_ids.dtype == np.int32
    assert chunks.char_start.dtype == chunks.cu_seqlens.dtype == np.int64

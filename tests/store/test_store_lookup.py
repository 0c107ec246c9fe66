"""Texts of documents, joined from their chunks, and keys that are looked up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.errors import UsageError
from m3cli.records import is_among
from m3cli.store.lookup import _Document, iter_passages
from m3cli.store.reader import open_folder
from tests.conftest import Completed

LONG = "Der schnelle braune Fuchs springt über den faulen Hund, und 数据 werden gelesen. " * 4
ROWS = [
    {"_id": "a", "title": "Titel", "text": LONG},
    {"_id": "b", "text": "short"},
    {"_id": "a", "text": "another with the same id"},
    {"_id": "c", "text": "not wanted"},
]


@given(*[st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1))] * 2)
def test_values_are_looked_up_among_sorted_ones(values: list[int], others: list[int]) -> None:
    found = is_among(np.array(values, np.int64), np.sort(np.array(others, np.int64)))
    assert found.tolist() == [value in others for value in values]


@given(st.text(min_size=1), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=12))
def test_spans_that_overlap_give_the_text(text: str, steps: list[tuple[int, int]]) -> None:
    document = _Document(id="d")
    spans = [(0, 1)]
    for length, overlap in steps:
        start = max(spans[-1][0] + 1, spans[-1][1] - overlap)
        if start >= len(text):
            break
        spans.append((start, max(spans[-1][1], min(len(text), start + length))))
    spans.append((spans[-1][1], len(text)))
    for number, (first, last) in enumerate(spans):
        assert document.continues("d", number)
        document.add(char_start=first, char_end=last, text=text[first:last])
    assert document.text == text


def test_a_gap_is_a_blank() -> None:
    document = _Document(id="d")
    document.add(char_start=0, char_end=3, text="one")
    document.add(char_start=4, char_end=7, text="two")
    assert document.text == "one two"
    assert not document.continues("d", 0)
    assert not document.continues("e", 2)


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_document_with_its_own_row_is_read_once(
    m3: Callable[..., Completed], tiny_m3: Path, tmp_path: Path, form: str
) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(orjson.dumps(row) for row in ROWS))
    flags = ("--outputs", "dense", "--max-length", 16, "--long-docs", "both", "--format", form, "--model", tiny_m3)
    assert m3("encode", "c.jsonl", *flags, "--keep-text").returncode == 0
    found = list(iter_passages(open_folder(tmp_path / "c.m3"), {"a", "b"}))
    assert [name for name, _ in found] == ["a", "b", "a"]
    assert found[0][1].replace("\n", " ").split() == f"Titel {LONG}".split()


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_texts_are_read_back(m3: Callable[..., Completed], tiny_m3: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(orjson.dumps(row) for row in ROWS))
    flags = ("--outputs", "dense", "--max-length", 16, "--overlap", 3, "--format", form, "--model", tiny_m3)
    assert m3("encode", "c.jsonl", *flags, "--keep-text").returncode == 0
    found = list(iter_passages(open_folder(tmp_path / "c.m3"), {"a", "b", "nowhere"}))
    assert [name for name, _ in found] == ["a", "b", "a"]
    assert found[0][1].split() == f"Titel\n{LONG}".split()
    assert [text for _, text in found[1:]] == ["short", "another with the same id"]


def test_a_folder_without_texts_is_an_error(m3: Callable[..., Completed], tiny_m3: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"_id": "b", "text": "short"}')
    assert m3("encode", "c.jsonl", "--outputs", "dense", "--model", tiny_m3).returncode == 0
    with pytest.raises(UsageError, match=r"c\.m3 has no texts; .* --keep-text"):
        list(iter_passages(open_folder(tmp_path / "c.m3"), {"b"}))

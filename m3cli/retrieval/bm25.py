"""A BM25 index in memory, by the package bm25s: what the vectors are compared with.

Lucene's variant with k1 0.9 and b 0.4, as pyserini has them, which the tables of BGE-M3's model card were made with.
Terms are M3's tokens, or plain words: runs of letters and digits without case, and each Chinese or Japanese character
by itself, as there are no blanks between words there; no stop words, no stemming.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from m3cli.errors import UsageError
from m3cli.retrieval.top import Rows, TopRows

K1, B = 0.9, 0.4
_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CHARACTER}]|[^\W_{_CHARACTER}]+")

Terms = Callable[[Sequence[str]], Iterable[Sequence[int] | Sequence[str]]]
"what cuts texts into terms"


def plain_terms(texts: Sequence[str]) -> list[list[str]]:
    """Cut texts into words."""
    return [_WORD.findall(text.casefold()) for text in texts]


class Bm25Index:
    """Texts as an inverted index; all of it is held.

    4 bytes a token, and about 24 for each different term of a text while bm25s makes the index, 8 from then on.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._numbers: dict[int | str, int] = {}
        self._texts: list[np.ndarray] = []

    def add(self, texts: Sequence[str]) -> None:
        """Add texts, in the corpus' order."""
        for found in self._terms(texts):
            numbers = [self._numbers.setdefault(term, len(self._numbers)) for term in found]
            self._texts.append(np.array(numbers, np.int32))

    def search(self, queries: Sequence[str], top: TopRows, *, places: Rows, keys: Rows) -> None:
        """Offer all texts that share a term with a query; [R] places and keys of the texts."""
        bm25s = import_bm25s()
        if not self._numbers:
            return
        index = bm25s.BM25(method="lucene", k1=K1, b=B)
        vocabulary = {str(number): number for number in range(len(self._numbers))}
        index.index(bm25s.tokenization.Tokenized(ids=_Lists(self._texts), vocab=vocabulary), show_progress=False)
        for number, found in enumerate(self._terms(queries)):
            known = [self._numbers[term] for term in found if term in self._numbers]
            if known:
                scores = index.get_scores_from_ids(known)
                rows = np.flatnonzero(scores > top.thresholds[number])
                top.offer(np.full(len(rows), number), places[rows], keys[rows], scores[rows].astype(np.float32))


class _Lists:
    """Arrays that are lists while they are looked at: bm25s goes over them twice, and Python's ints are large."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays)

    def __iter__(self) -> Iterator[list[int]]:
        return (array.tolist() for array in self._arrays)


def import_bm25s() -> Any:
    """Return the package bm25s.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import bm25s  # noqa: PLC0415  an extra
    except ImportError as error:
        raise UsageError("--mode bm25 needs the package bm25s: pip install 'm3cli[bm25]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it says on stderr what it is about to do
    return bm25s

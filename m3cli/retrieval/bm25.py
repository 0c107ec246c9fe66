"""A BM25 index in memory, by the package bm25s, as a baseline for the vectors.

The variant is Lucene's with k1 0.9 and b 0.4, pyserini's defaults, which BGE-M3's model card uses. Terms are M3's
tokens, or words: case-folded letters and digits, and single characters in Chinese and Japanese, which have no blanks
between words. There are no stop words and no stemming.
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
"cuts texts into terms"


def plain_terms(texts: Sequence[str]) -> list[list[str]]:
    """Return the words of each text."""
    return [_WORD.findall(text.casefold()) for text in texts]


class Bm25Index:
    """Inverted index of texts, in memory.

    It needs 4 bytes a token and 8 for each distinct term of a text, 24 while bm25s builds the index.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._numbers: dict[int | str, int] = {}
        self._texts: list[np.ndarray] = []
        self._built: Any = None
        "bm25s' index of all texts"

    def add(self, texts: Sequence[str]) -> None:
        """Add texts in corpus order."""
        self._built = None
        for found in self._terms(texts):
            numbers = [self._numbers.setdefault(term, len(self._numbers)) for term in found]
            self._texts.append(np.array(numbers, np.int32))

    def search(self, queries: Sequence[str], top: TopRows, *, positions: Rows, keys: Rows) -> None:
        """Offer all texts that share a term with a query; [R] positions and keys of the texts."""
        if not self._numbers:
            return
        if self._built is None:
            self._built = self._build()
        index = self._built
        for number, found in enumerate(self._terms(queries)):
            known = [self._numbers[term] for term in found if term in self._numbers]
            if known:
                scores = index.get_scores_from_ids(known)
                rows = np.flatnonzero(scores > top.thresholds[number])
                top.offer(np.full(len(rows), number), positions[rows], keys[rows], scores[rows].astype(np.float32))

    def _build(self) -> Any:
        bm25s = import_bm25s()
        index = bm25s.BM25(method="lucene", k1=K1, b=B)
        vocabulary = {str(number): number for number in range(len(self._numbers))}
        index.index(bm25s.tokenization.Tokenized(ids=_Lists(self._texts), vocab=vocabulary), show_progress=False)
        return index


class _Lists:
    """Arrays that become lists one by one: bm25s iterates twice, and Python's ints are large."""

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
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs its steps on stderr
    return bm25s

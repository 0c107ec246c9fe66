"""BM25 by the package bm25s over a folder's kept text, or over the corpus itself: the baseline for vectors.

The variant is Lucene's with k1 0.9 and b 0.4, pyserini's defaults, which BGE-M3's model card uses. Terms are M3's
tokens, or words: case-folded letters and digits, and single characters in Chinese and Japanese, which have no blanks
between words. There are no stop words and no stemming.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from m3cli.corpus.plan import plan_shards
from m3cli.corpus.reader import read_shards
from m3cli.corpus.sources import find_sources
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import ForeignFolder, UsageError, count_noun
from m3cli.jobs.search.queries import Queries, open_corpus_checkpoint
from m3cli.jobs.search.vectors import Found
from m3cli.progress import Progress
from m3cli.records import QueryHits
from m3cli.requests import SearchRequest
from m3cli.retrieval.scores import Ranked, Rows, TopRows, list_best
from m3cli.store.lookup import iter_texts
from m3cli.store.reader import OutputFolder, iter_ids


def open_terms(folder: OutputFolder, request: SearchRequest) -> Terms:
    """Return the function that splits texts into terms.

    Raises:
        UsageError: bm25s is not installed, or there is no text to search.
    """
    import_bm25s()
    if not request.corpus_inputs and not folder.run.config.keep_text:
        raise UsageError(
            f"--mode bm25: {folder.path.name} has no text; encode it with --keep-text, or name the corpus with --input"
        )
    if request.tokenizer == "plain":
        return plain_terms
    from m3cli.encoder.tokenizer import load_tokenizer  # noqa: PLC0415  takes a second

    tokenizer = load_tokenizer(open_corpus_checkpoint(folder, request))
    return lambda texts: (ids[1:-1].tolist() for ids in tokenizer.encode(list(texts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedTexts:
    """R texts, of a folder's rows or of the corpus."""

    index: Bm25Index
    positions: Rows
    "[R] in the folder, or in the corpus"
    keys: Rows
    "[R] of documents or chunks"
    ids: list[str] | None
    "of the corpus' documents; None: the texts are rows of the folder"


def index_texts(folder: OutputFolder, terms: Terms, request: SearchRequest) -> IndexedTexts:
    """Index the kept text of a folder's rows."""
    index, positions, keys = Bm25Index(terms), [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for texts, some, owners in iter_texts(folder, chunks=request.level == "chunk"):
        index.add(texts)
        positions.append(some)
        keys.append(owners)
    return IndexedTexts(index=index, positions=np.concatenate(positions), keys=np.concatenate(keys), ids=None)


def index_input(
    folder: OutputFolder,
    terms: Terms,
    request: SearchRequest,
    progress: Progress,
    *,
    stdin: PeekableStream | None = None,
) -> IndexedTexts:
    """Index complete documents of the corpus; report documents that only the corpus or only the folder has.

    Raises:
        ForeignFolder: folder and corpus share no document.
    """
    index, ids, unknown = Bm25Index(terms), list[str](), 0
    existing = {name for names, _ in iter_ids(folder.path, folder.entries) for name in names.to_pylist()}
    for names, texts in _read_input(folder, request, stdin):
        known = [number for number, name in enumerate(names) if name in existing]
        unknown += len(names) - len(known)
        ids += [names[number] for number in known]
        index.add([texts[number] for number in known])
    corpus = f"--input {' '.join(request.corpus_inputs)}"
    if not ids:
        raise ForeignFolder(
            f"{corpus} has none of the documents of {folder.path.name}: give the corpus that it was encoded from"
        )
    if unknown:
        progress.say(f"{count_noun(unknown, 'document')} of {corpus} not in {folder.path.name}: not searched")
    missing = len(existing.difference(ids))
    if missing:
        progress.say(
            f"{count_noun(missing, 'document')} of {folder.path.name} not in {corpus}: not searched; name all "
            "inputs that it was encoded from, --input once for each"
        )
    numbers: dict[str, int] = {}
    keys = np.array([numbers.setdefault(name, len(numbers)) for name in ids], np.int64)
    return IndexedTexts(index=index, positions=np.arange(len(ids)), keys=keys, ids=ids)


def search_terms(indexed: IndexedTexts, queries: Queries, request: SearchRequest) -> Found:
    """Rank texts by BM25."""
    texts = [text for text in queries.texts if text is not None]
    top = TopRows(len(texts), limit=request.top_k, threshold=0.0)
    indexed.index.search(texts, top, positions=indexed.positions, keys=indexed.keys)
    ranked = top.finish()
    return Found(ranked=ranked, parts={"bm25": ranked.score})


def describe_input_hits(ranked: Ranked, ids: Sequence[str], queries: Queries) -> list[QueryHits]:
    """Return the hits of each query among documents of the corpus."""
    bounds = np.searchsorted(ranked.query, np.arange(len(queries.ids) + 1))
    hits = []
    for number, (first, last) in enumerate(pairwise(bounds.tolist())):
        scores = ranked.score[first:last]
        hits.append(
            QueryHits(
                query=queries.ids[number],
                text=queries.texts[number],
                ids=tuple(ids[row] for row in ranked.row[first:last]),
                scores=scores,
                parts={"bm25": scores},
                chunk_index=None,
                char_start=None,
                char_end=None,
                texts=(None,) * (last - first),
            )
        )
    return hits


def _read_input(
    folder: OutputFolder, request: SearchRequest, stdin: PeekableStream | None
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ids and texts of the corpus, read with the folder's config."""
    config = folder.run.config
    fields = replace(config.fields, kept=())
    sources = find_sources(request.corpus_inputs, stdin=stdin, format_flag=None)
    plan = plan_shards(
        sources,
        fields=fields,
        shard_size=config.shard_size,
        limit=config.limit,
        max_row_bytes=config.max_row_bytes,
    )
    shards = read_shards(
        sources,
        plan=plan,
        fields=fields,
        schema=None,
        title_sep=config.title_sep,
        max_row_bytes=config.max_row_bytes,
        ask=lambda _: "read",
        stdin=stdin,
    )
    for shard in shards:
        yield [document.id for document in shard.documents], [document.text for document in shard.documents]


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
                scores = index.get_scores_from_ids(known).astype(np.float32, copy=False)
                rows = list_best(scores, keys, limit=top.limit, threshold=top.thresholds[number])
                top.offer(np.full(len(rows), number), positions[rows], keys[rows], scores[rows])

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

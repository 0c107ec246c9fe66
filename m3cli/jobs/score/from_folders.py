"""Pairs of ids, scored by the vectors of encoded folders: no model is loaded, torch is not imported.

For a window of pairs the ids are looked up, the queries' rows are read and held, and the corpus is passed once, shard
by shard: of each part (a row group, or a memory-mapped array) the rows that some pair wants are scored where they lie.
Where the queries' vectors are more than HELD_BYTES they are held in turns, and the corpus is passed once a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3cli.config import ALL_OUTPUTS
from m3cli.corpus.pairs import Pair, WindowLimits
from m3cli.encoder.embeddings import concat_embeddings, select_rows
from m3cli.errors import ForeignFolder, count_noun
from m3cli.jobs.score.command import WindowScores, number_distinct
from m3cli.progress import Progress
from m3cli.records import Embeddings, Output, TokenMatrices
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import Rows, decode_vectors, expand_rows, score_rows
from m3cli.store.lookup import FoundRows, RowLookup, read_parts
from m3cli.store.reader import OutputFolder, open_folder

HELD_BYTES = 256 << 20
"of the queries' ColBERT vectors in float32"
UNKNOWN_QUERY, UNKNOWN_PASSAGE = "unknown query id", "unknown passage id"
LIMITS = WindowLimits(pairs=100_000, text_bytes=64 << 20, side_bytes=64 << 20)


class FolderScorer:
    """Two encoded folders, which may be one and the same."""

    ids = True
    limits = LIMITS

    def __init__(self, request: ScoreRequest, progress: Progress) -> None:
        assert request.queries is not None
        assert request.corpus is not None
        self._chunks = request.chunks or "max"
        self._queries, self._corpus = open_folder(Path(request.queries)), open_folder(Path(request.corpus))
        check_same_model(self._queries, self._corpus)
        self._lookups = RowLookup(self._queries), RowLookup(self._corpus)
        shared = set(self._queries.run.config.outputs) & set(self._corpus.run.config.outputs)
        self.outputs: tuple[Output, ...] = tuple(output for output in ALL_OUTPUTS if output in shared)
        self._wanted: tuple[Output, ...] = ()
        self._dim = self._queries.run.checkpoint.dim
        self._rows = [0, 0]
        self._duplicates = 0
        for folder in {self._queries.path: self._queries, self._corpus.path: self._corpus}.values():
            if folder.manifest is None:
                progress.say(f"{folder.path.name} is not complete: ids that are not encoded yet are unknown")

    def load(self, wanted: Sequence[Output]) -> None:
        """Take note of what is wanted."""
        self._wanted = tuple(wanted)

    def describe(self) -> str:
        """Say what was read."""
        queries, passages = count_noun(self._rows[0], "query row"), count_noun(self._rows[1], "passage row")
        words = f"{queries} and {passages} read, no model loaded"
        if self._duplicates:
            words += f"; {count_noun(self._duplicates, 'id names', 'ids name')} several documents: the first was taken"
        return words

    def score_window(self, window: Sequence[Pair]) -> WindowScores:
        """Score the pairs of a window."""
        faults = [pair.fault for pair in window]
        places = np.array([place for place, fault in enumerate(faults) if not fault], np.int64)
        sides: list[tuple[FoundRows, Rows]] = []
        for side, lookup in enumerate(self._lookups):
            ids, numbers = number_distinct([window[place].passage if side else window[place].query for place in places])
            found = lookup.find(ids)
            self._duplicates += found.duplicates
            known = np.zeros(len(ids), np.bool_)
            known[found.wanted] = True
            for place in places[~known[numbers]]:
                faults[place] = faults[place] or (UNKNOWN_PASSAGE if side else UNKNOWN_QUERY)
            sides.append((found, numbers))
        joined = join_chunks(*sides[0], *sides[1], first_only=self._chunks == "first")
        scores = {output: np.full(len(window), np.nan, np.float32) for output in self._wanted}
        made = self._score_chunks(sides[0][0], sides[1][0], joined)
        for output, values in made.items():
            scores[output][places] = merge_chunks(values, joined, num_pairs=len(places), how=self._chunks)
        return WindowScores(scores=scores, faults=faults)

    def _score_chunks(
        self, queries: FoundRows, passages: FoundRows, joined: ChunkPairs
    ) -> dict[Output, NDArray[np.float32]]:
        """Return a score of each pair of chunks, by each output."""
        scores = {output: np.full(len(joined.pair), np.nan, np.float32) for output in self._wanted}
        # Sorted as the corpus lies on disk, so that the pairs of a part are neighbours.
        by_place = np.lexsort((passages.row[joined.passage], passages.shard[joined.passage]))
        for held_rows in self._turns(queries, np.unique(joined.query)):
            held, place_of = self._hold(queries, held_rows)
            mine = by_place[place_of[joined.query[by_place]] >= 0]
            rows, shards = passages.row[joined.passage[mine]], passages.shard[joined.passage[mine]]
            for part in read_parts(self._corpus, np.unique(shards).tolist(), outputs=self._wanted):
                span = part.embeddings.rows
                if not len(span):
                    continue
                first, last = np.searchsorted(shards, [part.shard, part.shard + 1])
                begin, end = first + np.searchsorted(rows[first:last], [span[0], span[-1] + 1])
                if begin == end:
                    continue
                some = mine[begin:end]
                made = score_rows(
                    held, part.embeddings, place_of[joined.query[some]], rows[begin:end] - span[0], outputs=self._wanted
                )
                for output, values in made.items():
                    scores[output][some] = values
        self._rows[1] += len(np.unique(joined.passage))
        return scores

    def _turns(self, queries: FoundRows, rows: Rows) -> Iterator[Rows]:
        """Cut the wanted query rows into runs whose vectors can be held."""
        sizes = np.cumsum(queries.num_tokens[rows] * self._dim * 4)
        turns = sizes // HELD_BYTES
        for turn in np.unique(turns):
            yield rows[turns == turn]

    def _hold(self, queries: FoundRows, rows: Rows) -> tuple[Embeddings, Rows]:
        """Read query rows; return them, and the place of each found row among them, -1 for one that is not held."""
        parts: list[Embeddings] = []
        place_of = np.full(len(queries.row), -1, np.int64)
        held = 0
        for part in read_parts(self._queries, np.unique(queries.shard[rows]).tolist(), outputs=self._wanted):
            span = part.embeddings.rows
            inside = (queries.shard[rows] == part.shard) & np.isin(queries.row[rows], span)
            some = rows[inside]
            if len(some):
                parts.append(select_rows(part.embeddings, queries.row[some] - span[0], rows=some))
                place_of[some] = held + np.arange(len(some))
                held += len(some)
        self._rows[0] += held
        return _widen(concat_embeddings(parts)), place_of


def _widen(held: Embeddings) -> Embeddings:
    """Turn ColBERT vectors to float32 once, as each is multiplied with many passages."""
    if (matrices := held.colbert_vecs) is None:
        return held
    return replace(held, colbert_vecs=TokenMatrices(indptr=matrices.indptr, vectors=decode_vectors(matrices)))


def check_same_model(queries: OutputFolder, corpus: OutputFolder) -> None:
    """Refuse folders of different checkpoints: their vectors have nothing to do with each other.

    Raises:
        ForeignFolder: they are.
    """
    ours, theirs = queries.run.checkpoint, corpus.run.checkpoint
    for what in ("hashes", "tokenizer_hash"):
        if getattr(ours, what) != getattr(theirs, what):
            raise ForeignFolder(
                f"{queries.path.name} was encoded with {ours.name} and {corpus.path.name} with {theirs.name}, "
                f"and their {'files' if what == 'hashes' else 'tokenizers'} differ: scores between them mean nothing; "
                "encode the queries with the corpus' checkpoint"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPairs:
    """Every chunk of a pair's query with every chunk of its passage; C of them, sorted by pair."""

    pair: Rows
    "[C]"
    query: Rows
    "[C] place among the queries' found rows"
    passage: Rows
    "[C] place among the passages' found rows"


def join_chunks(
    queries: FoundRows, query_of: Rows, passages: FoundRows, passage_of: Rows, *, first_only: bool
) -> ChunkPairs:
    """Join the chunks of pairs; a pair one side of which was not found has none.

    Args:
        queries: the rows found for the queries' ids.
        query_of: [P] which of those ids a pair's query is.
        passages: the rows found for the passages' ids.
        passage_of: [P] which of those ids a pair's passage is.
        first_only: take the first chunk of a document only.
    """
    query_rows, query_begins = _group(queries, first_only=first_only)
    passage_rows, passage_begins = _group(passages, first_only=first_only)
    # An id beyond the last one found has no rows.
    many = _count(query_begins, query_of), _count(passage_begins, passage_of)
    take, pair = expand_rows(np.zeros(len(query_of), np.int64), many[0] * many[1])
    width = many[1][pair]
    query = query_begins[query_of[pair]] + take // np.maximum(width, 1)
    passage = passage_begins[passage_of[pair]] + take % np.maximum(width, 1)
    return ChunkPairs(pair=pair, query=query_rows[query], passage=passage_rows[passage])


def _group(found: FoundRows, *, first_only: bool) -> tuple[Rows, Rows]:
    """Return found rows sorted by the id they belong to, and where each id's begin."""
    rows = np.flatnonzero(found.chunk_index <= 0) if first_only else np.arange(len(found.wanted))
    rows = rows[np.argsort(found.wanted[rows], kind="stable")]
    counts = np.bincount(found.wanted[rows]) if len(rows) else np.empty(0, np.int64)
    return rows, np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def _count(begins: Rows, numbers: Rows) -> Rows:
    counts = np.append(np.diff(begins), 0)
    found: Rows = counts[np.minimum(numbers, len(counts) - 1)]
    return found


def merge_chunks(values: NDArray[np.float32], joined: ChunkPairs, *, num_pairs: int, how: str) -> NDArray[np.float32]:
    """Return [num_pairs] the best or the mean of each pair's chunks; NaN where there are none.

    Each output is merged by itself: the chunk that is best by its dense vector need not be best by the others.
    """
    merged = np.full(num_pairs, np.nan, np.float32)
    if not len(values):
        return merged
    pairs, starts, counts = np.unique(joined.pair, return_index=True, return_counts=True)
    if how == "mean":
        merged[pairs] = np.add.reduceat(values.astype(np.float64), starts) / counts
    else:
        merged[pairs] = np.maximum.reduceat(values, starts)
    return merged

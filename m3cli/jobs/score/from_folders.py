"""Score pairs of ids by the vectors of encoded folders, without a model or torch.

For a window of pairs the ids are looked up, the queries' vectors are read into memory, and the corpus is read once. In
each row group (or memory-mapped array) the rows of some pair are scored. If the queries' vectors are more than
HELD_BYTES, they are read in several groups, and the corpus is read once per group.
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
    """Scorer of ids by two encoded folders, which may be the same."""

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
        """Set the outputs to score by."""
        self._wanted = tuple(wanted)

    def describe(self) -> str:
        """Return what was read, for the last message."""
        queries, passages = count_noun(self._rows[0], "query row"), count_noun(self._rows[1], "passage row")
        message = f"{queries} and {passages} read, no model loaded"
        if self._duplicates:
            message += (
                f"; {count_noun(self._duplicates, 'id names', 'ids name')} several documents: the first was taken"
            )
        return message

    def score_window(self, window: Sequence[Pair]) -> WindowScores:
        """Score the pairs of a window."""
        faults = [pair.fault for pair in window]
        positions = np.array([position for position, fault in enumerate(faults) if not fault], np.int64)
        sides: list[tuple[FoundRows, Rows]] = []
        for side, lookup in enumerate(self._lookups):
            ids, numbers = number_distinct(
                [window[position].passage if side else window[position].query for position in positions]
            )
            found = lookup.find(ids)
            self._duplicates += found.duplicates
            known = np.zeros(len(ids), np.bool_)
            known[found.wanted] = True
            for position in positions[~known[numbers]]:
                faults[position] = faults[position] or (UNKNOWN_PASSAGE if side else UNKNOWN_QUERY)
            sides.append((found, numbers))
        joined = join_chunks(*sides[0], *sides[1], first_only=self._chunks == "first")
        scores = {output: np.full(len(window), np.nan, np.float32) for output in self._wanted}
        made = self._score_chunks(sides[0][0], sides[1][0], joined)
        for output, values in made.items():
            scores[output][positions] = merge_chunks(values, joined, num_pairs=len(positions), how=self._chunks)
        return WindowScores(scores=scores, faults=faults)

    def _score_chunks(
        self, queries: FoundRows, passages: FoundRows, joined: ChunkPairs
    ) -> dict[Output, NDArray[np.float32]]:
        """Return the scores of each pair of chunks by each output."""
        scores = {output: np.full(len(joined.pair), np.nan, np.float32) for output in self._wanted}
        # In corpus order, so that the pairs of a row group are consecutive.
        by_position = np.lexsort((passages.row[joined.passage], passages.shard[joined.passage]))
        for held_rows in self._split_queries(queries, np.unique(joined.query)):
            held, position_of = self._hold(queries, held_rows)
            held_pairs = by_position[position_of[joined.query[by_position]] >= 0]
            rows, shards = passages.row[joined.passage[held_pairs]], passages.shard[joined.passage[held_pairs]]
            for part in read_parts(self._corpus, np.unique(shards).tolist(), outputs=self._wanted):
                span = part.embeddings.rows
                if not len(span):
                    continue
                first, last = np.searchsorted(shards, [part.shard, part.shard + 1])
                begin, end = first + np.searchsorted(rows[first:last], [span[0], span[-1] + 1])
                if begin == end:
                    continue
                some = held_pairs[begin:end]
                made = score_rows(
                    held,
                    part.embeddings,
                    position_of[joined.query[some]],
                    rows[begin:end] - span[0],
                    outputs=self._wanted,
                )
                for output, values in made.items():
                    scores[output][some] = values
        self._rows[1] += len(np.unique(joined.passage))
        return scores

    def _split_queries(self, queries: FoundRows, rows: Rows) -> Iterator[Rows]:
        """Split query rows into groups whose vectors are at most HELD_BYTES."""
        sizes = np.cumsum(queries.num_tokens[rows] * self._dim * 4)
        groups = sizes // HELD_BYTES
        for group in np.unique(groups):
            yield rows[groups == group]

    def _hold(self, queries: FoundRows, rows: Rows) -> tuple[Embeddings, Rows]:
        """Read query rows; return them, and the index of each found row among them, -1 for other rows."""
        parts: list[Embeddings] = []
        position_of = np.full(len(queries.row), -1, np.int64)
        held = 0
        for part in read_parts(self._queries, np.unique(queries.shard[rows]).tolist(), outputs=self._wanted):
            span = part.embeddings.rows
            inside = (queries.shard[rows] == part.shard) & np.isin(queries.row[rows], span)
            some = rows[inside]
            if len(some):
                parts.append(select_rows(part.embeddings, queries.row[some] - span[0], rows=some))
                position_of[some] = held + np.arange(len(some))
                held += len(some)
        self._rows[0] += held
        return _widen(concat_embeddings(parts)), position_of


def _widen(held: Embeddings) -> Embeddings:
    """Convert ColBERT vectors to float32 once, because each is multiplied with many passages."""
    if (matrices := held.colbert_vecs) is None:
        return held
    return replace(held, colbert_vecs=TokenMatrices(indptr=matrices.indptr, vectors=decode_vectors(matrices)))


def check_same_model(queries: OutputFolder, corpus: OutputFolder) -> None:
    """Raise ForeignFolder if two folders are of different checkpoints: their vectors cannot be compared."""
    first, second = queries.run.checkpoint, corpus.run.checkpoint
    for what in ("hashes", "tokenizer_hash"):
        if getattr(first, what) != getattr(second, what):
            raise ForeignFolder(
                f"{queries.path.name} was encoded with {first.name} and {corpus.path.name} with {second.name}, "
                f"and their {'files' if what == 'hashes' else 'tokenizers'} differ: scores between them mean nothing; "
                "encode the queries with the corpus' checkpoint"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPairs:
    """C pairs of a chunk of a pair's query and a chunk of its passage, sorted by pair."""

    pair: Rows
    "[C]"
    query: Rows
    "[C] index of a found row of the queries"
    passage: Rows
    "[C] index of a found row of the passages"


def join_chunks(
    queries: FoundRows, query_of: Rows, passages: FoundRows, passage_of: Rows, *, first_only: bool
) -> ChunkPairs:
    """Join the chunks of pairs; a pair with an unknown id has none.

    Args:
        queries: the rows found for the queries' ids.
        query_of: [P] index of each pair's query among those ids.
        passages: the rows found for the passages' ids.
        passage_of: [P] index of each pair's passage among those ids.
        first_only: use only the first chunk of a document.
    """
    query_rows, query_begins = _group(queries, first_only=first_only)
    passage_rows, passage_begins = _group(passages, first_only=first_only)
    # An id beyond the last one found has no rows.
    query_counts, passage_counts = _count(query_begins, query_of), _count(passage_begins, passage_of)
    take, pair = expand_rows(np.zeros(len(query_of), np.int64), query_counts * passage_counts)
    width = passage_counts[pair]
    query = query_begins[query_of[pair]] + take // np.maximum(width, 1)
    passage = passage_begins[passage_of[pair]] + take % np.maximum(width, 1)
    return ChunkPairs(pair=pair, query=query_rows[query], passage=passage_rows[passage])


def _group(found: FoundRows, *, first_only: bool) -> tuple[Rows, Rows]:
    """Return found rows sorted by their id, and the offset of each id's rows."""
    rows = np.flatnonzero(found.chunk_index <= 0) if first_only else np.arange(len(found.wanted))
    rows = rows[np.argsort(found.wanted[rows], kind="stable")]
    counts = np.bincount(found.wanted[rows]) if len(rows) else np.empty(0, np.int64)
    return rows, np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def _count(begins: Rows, numbers: Rows) -> Rows:
    counts = np.append(np.diff(begins), 0)
    found: Rows = counts[np.minimum(numbers, len(counts) - 1)]
    return found


def merge_chunks(values: NDArray[np.float32], joined: ChunkPairs, *, num_pairs: int, how: str) -> NDArray[np.float32]:
    """Return the best or the mean [num_pairs] of the scores of each pair's chunks; NaN for a pair without chunks.

    Each output is merged separately: the best chunk may differ between outputs.
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

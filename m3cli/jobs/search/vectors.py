"""A folder searched in one pass: part after part is scored against all queries, and the best rows are remembered.

    parts (read ahead) -> scan by one output, or by dense and sparse at once -> lists of the best
    hybrid: the lists' documents -> their rows, read again -> scores by all outputs -> one list

What is held: one part, the one being read, the queries, and the lists; never the corpus. Candidates are scored where
their rows come by, so that of those too nothing is held but the best chunk of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from m3cli.concurrency import prefetch
from m3cli.config import Fusion
from m3cli.records import Embeddings, Output, QueryHits
from m3cli.retrieval.scan import cut_slices, open_scan, scan_part
from m3cli.retrieval.scores import Rows, Weights, average_scores, expand_rows, fuse_ranks, score_rows
from m3cli.retrieval.top import Ranked, Scores, TopRows, number_runs, rank_rows
from m3cli.store.lookup import find_rows, iter_blocks, read_metadata
from m3cli.store.reader import OutputFolder
from m3cli.store.results import SNIPPET_LENGTH

BLOCK_PAIRS = 1 << 20
"queries and rows that are scored together when candidates are ranked again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is searched, and how."""

    folder: OutputFolder
    vocabulary: int
    device: str
    top_k: int
    chunks: bool
    "a hit is a chunk, not a document"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """How a hybrid search makes one list."""

    outputs: tuple[Output, ...]
    "that the scores are made of"
    sources: tuple[Output, ...]
    "that candidates are found by, some of the outputs"
    candidates: int
    "of a query by each of the sources"
    fusion: Fusion
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The hits of all queries; H of them, sorted by query, best first."""

    ranked: Ranked
    parts: dict[str, Scores]
    "[H] each"


def search_single(target: Target, queries: Embeddings, output: Output) -> Found:
    """Rank by one output."""
    ranked = scan_folder(target, queries, (output,), limit=target.top_k)[output]
    return Found(ranked=ranked, parts={output: ranked.score})


def scan_folder(target: Target, queries: Embeddings, outputs: Sequence[Output], *, limit: int) -> dict[Output, Ranked]:
    """Pass the folder once; return the `limit` best of each query by each output.

    A row without a token in common with the query is never found by sparse.
    """
    scans = {
        output: open_scan(output, queries, vocabulary=target.vocabulary, device=target.device) for output in outputs
    }
    floors = {output: 0.0 if output == "sparse" else -np.inf for output in outputs}
    tops = {output: TopRows(len(queries.rows), limit=limit, threshold=floor) for output, floor in floors.items()}
    parts = prefetch(iter_blocks(target.folder, outputs=outputs, chunks=target.chunks), depth=1, name="read ahead")
    seen = 0
    for part in parts:
        for output, scan in scans.items():
            scan_part(scan, part.embeddings, tops[output], rows=part.places, find_keys=part.find_keys, seen=seen)
        seen += len(part.places)
    return {output: top.finish() for output, top in tops.items()}


def search_hybrid(target: Target, queries: Embeddings, blend: Blend) -> Found:
    """Rank the best candidates by dense, sparse or both by all outputs together, as the M3 paper does."""
    lists = scan_folder(target, queries, blend.sources, limit=blend.candidates)
    stacked = np.concatenate([np.stack([found.query, found.key], axis=1) for found in lists.values()])
    pairs, numbers = np.unique(stacked, axis=0, return_inverse=True)
    query, key = pairs[:, 0], pairs[:, 1]
    best_place, parts = score_candidates(target, queries, blend, query=query, key=key)
    if blend.fusion == "weighted":
        score = average_scores(parts, blend.weights)
    else:
        ends = np.cumsum([len(found.query) for found in lists.values()])
        ranks = {}
        for (output, found), mine in zip(lists.items(), np.split(numbers.ravel(), ends[:-1]), strict=True):
            ranks[output] = np.full(len(query), -1, np.int64)
            ranks[output][mine] = found.rank
        for output in set(blend.outputs) - set(lists):
            ranks[output] = _rank_candidates(query, best_place, parts[output], limit=blend.candidates)
        score = fuse_ranks(ranks, blend.weights)
    by_place = np.lexsort((best_place, query))  # so that the number of a candidate stands for its place
    ranked = rank_rows(query[by_place], np.arange(len(query)), key[by_place], score[by_place], limit=target.top_k)
    chosen = by_place[ranked.row]
    ranked = Ranked(query=ranked.query, row=best_place[chosen], key=ranked.key, score=ranked.score)
    return Found(ranked=ranked, parts={output: values[chosen] for output, values in parts.items()})


def _rank_candidates(query: Rows, place: Rows, score: Scores, *, limit: int) -> Rows:
    """Return [C] ranks of candidates by one output, -1 beyond `limit`."""
    order = np.lexsort((place, -score, query))
    ranks = np.empty(len(query), np.int64)
    ranks[order] = number_runs(query[order])
    return np.where(ranks < limit, ranks, -1)


def score_candidates(
    target: Target, queries: Embeddings, blend: Blend, *, query: Rows, key: Rows
) -> tuple[Rows, dict[Output, Scores]]:
    """Score candidates, pairs of a query and a document's key, by all outputs; parts without any are not read.

    Returns:
        [C] the place of each candidate's best chunk by the weighted average, and [C] scores by each output, each the
        best of the document's chunks.
    """
    places, owners = find_rows(target.folder, key, chunks=target.chunks)
    by_key = np.argsort(key, kind="stable")  # the candidates of a row's document are neighbours
    begins = np.searchsorted(key[by_key], owners)
    counts = np.searchsorted(key[by_key], owners, side="right") - begins
    best = _Best(len(key), blend)
    wanted = iter_blocks(target.folder, outputs=blend.outputs, chunks=target.chunks, wanted=places)
    for part in prefetch(wanted, depth=1, name="read ahead"):
        first, last = np.searchsorted(places, [part.first, part.first + len(part.places)])
        for run in cut_slices(np.concatenate(([0], np.cumsum(counts[first:last]))), most=BLOCK_PAIRS):
            rows = slice(first + run.start, first + run.stop)
            take, row = expand_rows(begins[rows], counts[rows])
            candidate, place = by_key[take], places[rows][row]
            made = score_rows(queries, part.embeddings, query[candidate], place - part.first, outputs=blend.outputs)
            best.offer(candidate, place, made)
    return best.place, best.scores


class _Best:
    """The best of each of C candidates' chunks so far."""

    def __init__(self, num_candidates: int, blend: Blend) -> None:
        self.place: Rows = np.zeros(num_candidates, np.int64)
        "[C] of the best chunk by the weighted average"
        self.scores: dict[Output, Scores] = {
            output: np.full(num_candidates, -np.inf, np.float32) for output in blend.outputs
        }
        "[C] each"
        self._weights = blend.weights
        self._average: Scores = np.full(num_candidates, -np.inf, np.float32)

    def offer(self, candidate: Rows, place: Rows, scores: dict[Output, Scores]) -> None:
        """Take in some chunks, which come later in the corpus than those before: [P] each."""
        scores = {output: np.nan_to_num(values, nan=0.0) for output, values in scores.items()}  # no ColBERT vectors
        average = average_scores(scores, self._weights)
        order = np.lexsort((place, -average, candidate))
        starts = np.flatnonzero(np.diff(candidate[order], prepend=-1))
        firsts = order[starts]
        mine = candidate[firsts]
        better = average[firsts] > self._average[mine]
        self._average[mine[better]] = average[firsts[better]]
        self.place[mine[better]] = place[firsts[better]]
        for output, values in scores.items():
            self.scores[output][mine] = np.maximum(
                self.scores[output][mine], np.maximum.reduceat(values[order], starts)
            )


def describe_hits(
    found: Found, folder: OutputFolder, *, ids: Sequence[str], texts: Sequence[str | None], chunks: bool, shown: bool
) -> list[QueryHits]:
    """Read what the hits' rows say, and return the hits of each query, those without any included.

    A run is names and scores; where more is shown (`shown`), spans are read and the beginnings of kept texts.
    """
    ranked = found.ranked
    places, numbers = np.unique(ranked.row, return_inverse=True)
    length = SNIPPET_LENGTH if shown and folder.run.config.keep_text else 0
    words = read_metadata(folder, places, spans=shown, length=length)
    bounds = np.searchsorted(ranked.query, np.arange(len(ids) + 1))
    hits: list[QueryHits] = []
    for query, (first, last) in enumerate(pairwise(bounds.tolist())):
        mine = numbers[first:last]
        index = words.chunk_index[mine]
        names = [words.ids[row] for row in mine]
        if chunks:
            names = [f"{name}#{chunk}" for name, chunk in zip(names, index, strict=True)]
        hits.append(
            QueryHits(
                query=ids[query],
                text=texts[query],
                ids=tuple(names),
                scores=ranked.score[first:last],
                parts={name: values[first:last] for name, values in found.parts.items()},
                chunk_index=index,
                char_start=None if words.char_start is None else words.char_start[mine],
                char_end=None if words.char_end is None else words.char_end[mine],
                texts=(None,) * len(names) if words.texts is None else tuple(words.texts[row] for row in mine),
            )
        )
    return hits

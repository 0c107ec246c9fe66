"""Search a folder in one pass: score row group after row group against all queries, and keep the best rows.

    row groups (prefetched) -> scan by one output, or by dense and sparse at once -> lists of the best
    hybrid: documents of the lists -> read their rows again -> scores by all outputs -> one list

In memory are the queries, two row groups and the lists, never the corpus. Candidates are scored as their rows are read;
only the best chunk of each is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from m3cli.concurrency import prefetch
from m3cli.jobs.reread import Passage
from m3cli.jobs.search.queries import Queries, View
from m3cli.records import Embeddings, Output, QueryHits
from m3cli.requests import HITS_SHOWN, Fusion
from m3cli.retrieval.scan import cut_slices, open_scan, scan_part
from m3cli.retrieval.scores import (
    Ranked,
    Rows,
    Scores,
    TopRows,
    Weights,
    average_scores,
    expand_rows,
    fuse_ranks,
    number_runs,
    rank_rows,
    score_rows,
)
from m3cli.store.lookup import find_rows, iter_blocks, read_metadata, shards_of
from m3cli.store.reader import OutputFolder
from m3cli.store.results import SNIPPET_LENGTH

BLOCK_PAIRS = 1 << 20
"pairs of a query and a row that are scored together when candidates are ranked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The folder that is searched, and the options that all modes share."""

    folder: OutputFolder
    vocabulary: int
    device: str
    top_k: int
    chunks: bool
    "a hit is a chunk, not a document"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Options of a hybrid search."""

    outputs: tuple[Output, ...]
    "scored"
    sources: tuple[Output, ...]
    "outputs that find candidates"
    candidates: int
    "per query and source"
    fusion: Fusion
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """H hits of all queries, sorted by query, best first."""

    ranked: Ranked
    parts: dict[str, Scores]
    "[H] each"


def search_single(target: Target, queries: Embeddings, output: Output) -> Found:
    """Rank by one output."""
    ranked = scan_folder(target, queries, (output,), limit=target.top_k)[output]
    return Found(ranked=ranked, parts={output: ranked.score})


def scan_folder(target: Target, queries: Embeddings, outputs: Sequence[Output], *, limit: int) -> dict[Output, Ranked]:
    """Read the folder once; return the `limit` best of each query by each output.

    Sparse finds only rows that share a token with the query.
    """
    scans = {
        output: open_scan(output, queries, vocabulary=target.vocabulary, device=target.device) for output in outputs
    }
    lowest = {output: 0.0 if output == "sparse" else -np.inf for output in outputs}
    tops = {output: TopRows(len(queries.rows), limit=limit, threshold=lowest[output]) for output in outputs}
    parts = prefetch(iter_blocks(target.folder, outputs=outputs, chunks=target.chunks), depth=1, name="read ahead")
    seen = 0
    for part in parts:
        for output, scan in scans.items():
            scan_part(scan, part.embeddings, tops[output], rows=part.positions, find_keys=part.find_keys, seen=seen)
        seen += len(part.positions)
    return {output: top.finish() for output, top in tops.items()}


def search_hybrid(target: Target, queries: Embeddings, blend: Blend) -> Found:
    """Find candidates by dense, sparse or both, and rank them by all outputs, as in the M3 paper."""
    lists = scan_folder(target, queries, blend.sources, limit=blend.candidates)
    stacked = np.concatenate([np.stack([found.query, found.key], axis=1) for found in lists.values()])
    pairs, numbers = np.unique(stacked, axis=0, return_inverse=True)
    query, key = pairs[:, 0], pairs[:, 1]
    best_position, parts = score_candidates(target, queries, blend, query=query, key=key)
    if blend.fusion == "weighted":
        score = average_scores(parts, blend.weights)
    else:
        ends = np.cumsum([len(found.query) for found in lists.values()])
        ranks = {}
        for (output, found), candidates in zip(lists.items(), np.split(numbers.ravel(), ends[:-1]), strict=True):
            ranks[output] = np.full(len(query), -1, np.int64)
            ranks[output][candidates] = found.rank
        for output in set(blend.outputs) - set(lists):
            ranks[output] = _rank_candidates(query, best_position, parts[output], limit=blend.candidates)
        score = fuse_ranks(ranks, blend.weights)
    order = np.lexsort((best_position, query))  # equal scores are ranked by position
    ranked = rank_rows(query[order], np.arange(len(query)), key[order], score[order], limit=target.top_k)
    chosen = order[ranked.row]
    ranked = Ranked(query=ranked.query, row=best_position[chosen], key=ranked.key, score=ranked.score)
    return Found(ranked=ranked, parts={output: values[chosen] for output, values in parts.items()})


def _rank_candidates(query: Rows, position: Rows, score: Scores, *, limit: int) -> Rows:
    """Return [C] ranks of candidates by one output, -1 beyond `limit`."""
    order = np.lexsort((position, -score, query))
    ranks = np.empty(len(query), np.int64)
    ranks[order] = number_runs(query[order])
    return np.where(ranks < limit, ranks, -1)


def score_candidates(
    target: Target, queries: Embeddings, blend: Blend, *, query: Rows, key: Rows
) -> tuple[Rows, dict[Output, Scores]]:
    """Score candidates, pairs of a query and a document's key, by all outputs.

    Returns:
        the position [C] of each candidate's best chunk by the weighted average, and the best score [C] of its chunks by
        each output.
    """
    positions, owners = find_rows(target.folder, key, chunks=target.chunks)
    by_key = np.argsort(key, kind="stable")  # the candidates of a document are consecutive
    begins = np.searchsorted(key[by_key], owners)
    counts = np.searchsorted(key[by_key], owners, side="right") - begins
    best = _Best(len(key), blend)
    wanted = iter_blocks(target.folder, outputs=blend.outputs, chunks=target.chunks, wanted=positions)
    for part in prefetch(wanted, depth=1, name="read ahead"):
        first, last = np.searchsorted(positions, [part.first, part.first + len(part.positions)])
        for span in cut_slices(np.concatenate(([0], np.cumsum(counts[first:last]))), most=BLOCK_PAIRS):
            rows = slice(first + span.start, first + span.stop)
            take, row = expand_rows(begins[rows], counts[rows])
            candidate, position = by_key[take], positions[rows][row]
            made = score_rows(queries, part.embeddings, query[candidate], position - part.first, outputs=blend.outputs)
            best.offer(candidate, position, made)
    return best.position, best.scores


class _Best:
    """Best chunk and best scores of each of C candidates so far."""

    def __init__(self, num_candidates: int, blend: Blend) -> None:
        self.position: Rows = np.zeros(num_candidates, np.int64)
        "[C] of the best chunk by the weighted average"
        self.scores: dict[Output, Scores] = {
            output: np.full(num_candidates, -np.inf, np.float32) for output in blend.outputs
        }
        "[C] each"
        self._weights = blend.weights
        self._average: Scores = np.full(num_candidates, -np.inf, np.float32)

    def offer(self, candidate: Rows, position: Rows, scores: dict[Output, Scores]) -> None:
        """Add P scored chunks, which follow the previous ones in the corpus."""
        scores = {output: np.nan_to_num(values, nan=0.0) for output, values in scores.items()}  # no ColBERT vectors
        average = average_scores(scores, self._weights)
        order = np.lexsort((position, -average, candidate))
        starts = np.flatnonzero(np.diff(candidate[order], prepend=-1))
        firsts = order[starts]
        owners = candidate[firsts]
        better = average[firsts] > self._average[owners]
        self._average[owners[better]] = average[firsts[better]]
        self.position[owners[better]] = position[firsts[better]]
        for output, values in scores.items():
            self.scores[output][owners] = np.maximum(
                self.scores[output][owners], np.maximum.reduceat(values[order], starts)
            )


def describe_hits(found: Found, folder: OutputFolder, queries: Queries, *, chunks: bool, view: View) -> list[QueryHits]:
    """Read the rows of the hits; return the hits of each query, also of queries without hits."""
    ranked = found.ranked
    positions, numbers = np.unique(ranked.row, return_inverse=True)
    length = SNIPPET_LENGTH if view.spans and folder.run.config.keep_text else 0
    rows = read_metadata(folder, positions, spans=view.spans, length=length)
    bounds = np.searchsorted(ranked.query, np.arange(len(queries.ids) + 1))
    hits: list[QueryHits] = []
    for query, (first, last) in enumerate(pairwise(bounds.tolist())):
        own = numbers[first:last]
        index = rows.chunk_index[own]
        names = [rows.ids[row] for row in own]
        starts = None if rows.char_start is None else rows.char_start[own]
        ends = None if rows.char_end is None else rows.char_end[own]
        snippets: list[str | None] = [None] * len(names)
        if rows.texts is not None:
            snippets = [rows.texts[row] for row in own]
        elif view.input_texts is not None and starts is not None and ends is not None:
            best = zip(shards_of(ranked.row[first:last]), names, starts.tolist(), ends.tolist(), strict=True)
            passages = [
                Passage(shard=shard, id=name, start=start, stop=stop)
                for shard, name, start, stop in islice(best, HITS_SHOWN)
            ]
            snippets[:HITS_SHOWN] = view.input_texts.read(passages, length=SNIPPET_LENGTH)
        if chunks:
            names = [f"{name}#{chunk}" for name, chunk in zip(names, index, strict=True)]
        hits.append(
            QueryHits(
                query=queries.ids[query],
                text=queries.texts[query],
                ids=tuple(names),
                scores=ranked.score[first:last],
                parts={name: values[first:last] for name, values in found.parts.items()},
                chunk_index=index,
                char_start=starts,
                char_end=ends,
                texts=tuple(snippets),
            )
        )
    return hits

"""`m3 score --explain`: the tokens that contribute to a pair's scores.

Sparse: the shared tokens with their weights and products. ColBERT: for each vector of the query the best token of the
passage and its similarity; `</s>` has a vector, which counts in the score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from m3cli.corpus.pairs import Pair, WindowLimits, cut_windows
from m3cli.corpus.streams import PeekableStream
from m3cli.errors import UsageError
from m3cli.jobs.score.command import finish_scores, open_pairs, resolve_modes
from m3cli.jobs.score.from_texts import TextScorer
from m3cli.progress import Progress
from m3cli.records import Embeddings, LexicalWeights
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import check_weights, parts_of

LIMITS = WindowLimits(pairs=256, text_bytes=64 << 10, side_bytes=64 << 10)


def explain_pairs(
    request: ScoreRequest, *, progress: Progress, stdin: PeekableStream | None = None
) -> Iterator[dict[str, Any]]:
    """Yield for each row of the pairs file its scores, shared tokens and best matches, as plain JSON values.

    Raises:
        UsageError: the pairs are ids; folders have no tokens.
    """
    if request.queries is not None or request.corpus is not None:
        raise UsageError("--explain needs the texts of the pairs: leave --queries and --corpus out")
    if request.out is not None:
        raise UsageError("--explain prints to standard output: leave --out out and redirect the output")
    pairs = open_pairs(request, progress, ids=False, stdin=stdin)
    scorer = TextScorer(request, progress)
    modes = resolve_modes(request, scorer.outputs)
    check_weights(modes, request.weights)
    scorer.load(parts_of(modes))
    for window in cut_windows(pairs.read(ids=False, stdin=stdin), LIMITS):
        scores, faults = finish_scores(scorer.score_window(window), modes, weights=request.weights)
        sides = _Sides(scorer, [pair for pair, fault in zip(window, faults, strict=True) if not fault])
        for index, (pair, fault) in enumerate(zip(window, faults, strict=True)):
            found = {mode: None if fault else round(float(scores[mode][index]), 6) for mode in modes}
            yield {
                "row": pair.number,
                "query": pair.query,
                "passage": pair.passage,
                "fault": fault or None,
                "scores": found,
                **({} if fault else sides.explain(pair)),
            }


class _Sides:
    """Embeddings and tokens of the texts of some pairs."""

    def __init__(self, scorer: TextScorer, pairs: list[Pair]) -> None:
        self._format_token = scorer.encoder.format_token
        self._sides: list[tuple[dict[str, int], Embeddings, tuple[Any, ...]]] = []
        texts = [pair.query for pair in pairs], [pair.passage for pair in pairs]
        for side, max_length in zip(texts, scorer.lengths, strict=True):
            numbers = {text: row for row, text in enumerate(dict.fromkeys(side))}
            if numbers:
                made, tokens = scorer.encoder.encode_texts(list(numbers), max_length=max_length)
                self._sides.append((numbers, made, tokens.input_ids))

    def explain(self, pair: Pair) -> dict[str, Any]:
        (queries, left, left_ids), (passages, right, right_ids) = self._sides
        query, passage = queries[pair.query], passages[pair.passage]
        found: dict[str, Any] = {}
        if left.lexical_weights is not None and right.lexical_weights is not None:
            found["shared_tokens"] = self._share(left.lexical_weights, query, right.lexical_weights, passage)
        if left.colbert_vecs is not None and right.colbert_vecs is not None:
            first, last = left.colbert_vecs.indptr[query : query + 2]
            begin, end = right.colbert_vecs.indptr[passage : passage + 2]
            similarity = left.colbert_vecs.vectors[first:last] @ right.colbert_vecs.vectors[begin:end].T
            best = similarity.argmax(axis=1)
            found["best_matches"] = [
                {
                    "query_token": self._format_token(int(left_ids[query][1 + position])),
                    "passage_token": self._format_token(int(right_ids[passage][1 + match])),
                    "passage_position": int(1 + match),
                    "similarity": round(float(similarity[position, match]), 6),
                }
                for position, match in enumerate(best.tolist())
            ]
        return found

    def _share(self, left: LexicalWeights, query: int, right: LexicalWeights, passage: int) -> list[dict[str, Any]]:
        first = slice(left.indptr[query], left.indptr[query + 1])
        second = slice(right.indptr[passage], right.indptr[passage + 1])
        tokens, at_left, at_right = np.intersect1d(left.indices[first], right.indices[second], return_indices=True)
        weights = left.values[first][at_left], right.values[second][at_right]
        shared = [
            {
                "token": self._format_token(token),
                "query_weight": round(query_weight, 6),
                "passage_weight": round(passage_weight, 6),
                "product": round(query_weight * passage_weight, 6),
            }
            for token, query_weight, passage_weight in zip(
                tokens.tolist(), weights[0].tolist(), weights[1].tolist(), strict=True
            )
        ]
        return sorted(shared, key=lambda each: -float(each["product"]))

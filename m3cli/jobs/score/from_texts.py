"""Score pairs of texts by the model: each distinct text of a window is encoded once.

The side of a window with less text is encoded first and kept in memory. Then the other side is encoded, and the pairs
of each batch are scored at once: in memory are the vectors of one side and of one batch. A text on both sides (cut at
the same length on both) is encoded with the first side.

`--explain` gives the tokens that contribute. Sparse: the shared tokens with their weights and products. ColBERT: for
each vector of the query the best token of the passage and its similarity; `</s>` has a vector, which counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3cli.corpus.pairs import Pair, WindowLimits, cut_windows
from m3cli.corpus.streams import PeekableStream
from m3cli.encoder import device as machine
from m3cli.encoder.embeddings import concat_embeddings
from m3cli.encoder.encode import FailedRow, TextEncoder, resolve_length
from m3cli.errors import UsageError, count_noun
from m3cli.jobs.encode.resolve import open_checkpoint
from m3cli.jobs.score.command import WindowScores, finish_scores, number_distinct, open_pairs, resolve_modes
from m3cli.progress import Progress
from m3cli.records import Embeddings, LexicalWeights, Output
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import Rows, check_weights, expand_rows, parts_of, score_rows

WINDOW_LIMITS = {
    "cpu": WindowLimits(pairs=50_000, text_bytes=8 << 20, side_bytes=256 << 10),
    "cuda": WindowLimits(pairs=200_000, text_bytes=32 << 20, side_bytes=1 << 20),
}
"256 KiB of text are about 64,000 tokens: 256 MiB of ColBERT vectors of 1,024 float32"
EXPLAINED_LIMITS = WindowLimits(pairs=256, text_bytes=64 << 10, side_bytes=64 << 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPairs:
    """Scores of P pairs of a window."""

    pairs: Rows
    "[P]"
    scores: dict[Output, NDArray[np.float32]]
    "[P] each"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPairs:
    """Pairs of a window with a text that cannot be encoded."""

    pairs: Rows
    reason: str


class TextScorer:
    """Scorer of texts by a checkpoint."""

    ids = False

    def __init__(self, request: ScoreRequest, progress: Progress, *, loaded: TextEncoder | None = None) -> None:
        self._request, self._progress, self._loaded = request, progress, loaded
        self._checkpoint = loaded.checkpoint if loaded else open_checkpoint(request.model, request.revision)
        self.lengths = (  # of queries and of passages, in tokens
            resolve_length(request.max_query_length, self._checkpoint, option="--max-query-length"),
            resolve_length(request.max_passage_length, self._checkpoint, option="--max-passage-length"),
        )
        self._device = loaded.device if loaded else machine.resolve_device(request.device)
        self.outputs: tuple[Output, ...] = self._checkpoint.outputs
        self.limits = WINDOW_LIMITS["cuda" if self._device.startswith("cuda") else "cpu"]
        self._texts = self._tokens = self._truncated = 0
        "encoded so far"
        self._wanted: tuple[Output, ...] = ()
        self.encoder: TextEncoder

    def load(self, wanted: Sequence[Output]) -> None:
        """Load tokenizer and model, unless they are loaded."""
        self._wanted = tuple(wanted)
        if self._loaded is not None:
            self.encoder = self._loaded.select(self._wanted)
            return
        dtype = machine.resolve_dtype(self._request.dtype, self._device)
        self._progress.say(f"{self._checkpoint.name}, {dtype} on {self._device}")
        self.encoder = TextEncoder(
            self._checkpoint,
            outputs=self._wanted,
            device=self._device,
            dtype=dtype,
            max_batch_tokens=self._request.max_batch_tokens,
        )

    def describe(self) -> str:
        """Return what was encoded, for the last message."""
        texts = count_noun(self._texts, "distinct text")
        return f"{texts} encoded, {count_noun(self._tokens, 'token')}, {self._truncated:,} truncated"

    def score_window(self, window: Sequence[Pair]) -> WindowScores:
        """Score the pairs of a window."""
        faults = [pair.fault for pair in window]
        positions = np.array([position for position, fault in enumerate(faults) if not fault], np.int64)
        scores = {output: np.full(len(window), np.nan, np.float32) for output in self._wanted}
        if len(positions):
            sides = (
                [window[position].query for position in positions],
                [window[position].passage for position in positions],
            )
            for made in self._score_sides(sides):
                if isinstance(made, FailedPairs):
                    for position in positions[made.pairs]:
                        faults[position] = made.reason
                else:
                    for output, values in made.scores.items():
                        scores[output][positions[made.pairs]] = values
        return WindowScores(scores=scores, faults=faults)

    def _score_sides(self, sides: tuple[list[str], list[str]]) -> Iterator[ScoredPairs | FailedPairs]:
        """Yield pairs in groups, with scores or with the reason that they have none."""
        held_side = _lighter(sides)
        held, held_rows = number_distinct(sides[held_side])
        other = sides[1 - held_side]
        known = {text: row for row, text in enumerate(held)} if self.lengths[0] == self.lengths[1] else {}
        other_rows = np.array([known.get(text, -1) for text in other], np.int64)

        parts = list(self._encode(held, self.lengths[held_side]))
        position_of = np.full(len(held), -1, np.int64)  # index of each held text, -1 if it could not be encoded
        made = [part for part in parts if isinstance(part, Embeddings)]
        for failed in (part for part in parts if isinstance(part, FailedRow)):
            failed_pairs = (held_rows == failed.row) | (other_rows == failed.row)
            yield FailedPairs(pairs=np.flatnonzero(failed_pairs), reason=failed.reason)
        if not made:
            return
        kept = concat_embeddings(made)
        position_of[kept.rows] = np.arange(len(kept.rows))
        held_positions = position_of[held_rows]

        both_held = (other_rows >= 0) & (held_positions >= 0) & (position_of[other_rows] >= 0)
        pairs = np.flatnonzero(both_held)
        if len(pairs):
            yield self._score(kept, kept, pairs, held_positions[pairs], position_of[other_rows[pairs]], held_side)
        yield from self._score_fresh(
            kept, held_positions, other, np.flatnonzero((other_rows < 0) & (held_positions >= 0)), held_side
        )

    def _score_fresh(
        self, kept: Embeddings, held_positions: Rows, other: list[str], pairs: Rows, held_side: int
    ) -> Iterator[ScoredPairs | FailedPairs]:
        """Encode texts that are not held, and score the pairs of each batch."""
        texts, rows = number_distinct([other[pair] for pair in pairs])
        pairs = pairs[np.argsort(rows, kind="stable")]  # pairs of text i: begins[i] : begins[i + 1]
        begins = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(texts)))))
        for made in self._encode(texts, self.lengths[1 - held_side]):
            if isinstance(made, FailedRow):
                yield FailedPairs(pairs=pairs[begins[made.row] : begins[made.row + 1]], reason=made.reason)
                continue
            take, owner = expand_rows(begins[made.rows], np.diff(begins)[made.rows])
            yield self._score(kept, made, pairs[take], held_positions[pairs[take]], owner, held_side)

    def _score(
        self, held: Embeddings, made: Embeddings, pairs: Rows, held_rows: Rows, rows: Rows, held_side: int
    ) -> ScoredPairs:
        sides = (held, made, held_rows, rows) if held_side == 0 else (made, held, rows, held_rows)
        return ScoredPairs(pairs=pairs, scores=score_rows(*sides, outputs=self._wanted))

    def _encode(self, texts: list[str], max_length: int) -> Iterator[Embeddings | FailedRow]:
        """Yield the embeddings of texts, longest first; rows are indices into `texts`."""
        if not texts:
            return
        tokenised = self.encoder.tokenise(texts, max_length=max_length)
        self._texts += len(texts)
        self._tokens += int(tokenised.num_tokens.sum())
        self._truncated += tokenised.truncated
        num_tokens = tokenised.num_tokens
        for made in self.encoder.encode_tokens(tokenised):
            yield made
            rows = made.rows if isinstance(made, Embeddings) else np.array([made.row])
            self._progress.advance(documents=len(rows), tokens=int(num_tokens[rows].sum()), shards=0.0)


def _lighter(sides: tuple[list[str], list[str]]) -> int:
    """Return the side with less distinct text: 0 for queries, 1 for passages."""
    sizes = [sum(map(len, set(side))) for side in sides]
    return int(sizes[1] < sizes[0])


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
    for window in cut_windows(pairs.read(ids=False, stdin=stdin), EXPLAINED_LIMITS):
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

"""Score pairs of texts by the model: each distinct text of a window is encoded once.

The side of a window with less text is encoded first and kept in memory. Then the other side is encoded, and the pairs
of each batch are scored at once: in memory are the vectors of one side and of one batch. A text on both sides (cut at
the same length on both) is encoded with the first side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3cli.corpus.pairs import Pair, WindowLimits
from m3cli.encoder import device as machine
from m3cli.encoder.embeddings import concat_embeddings
from m3cli.encoder.encode import FailedRow
from m3cli.encoder.text_encoder import TextEncoder, resolve_length
from m3cli.errors import count_noun
from m3cli.jobs.encode.resolve import open_checkpoint
from m3cli.jobs.score.command import WindowScores, number_distinct
from m3cli.progress import Progress
from m3cli.records import Embeddings, Output
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import Rows, expand_rows, score_rows

WINDOW_LIMITS = {
    "cpu": WindowLimits(pairs=50_000, text_bytes=8 << 20, side_bytes=256 << 10),
    "cuda": WindowLimits(pairs=200_000, text_bytes=32 << 20, side_bytes=1 << 20),
}
"256 KiB of text are about 64,000 tokens: 256 MiB of ColBERT vectors of 1,024 float32"


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

"""The figures that BAAI/bge-m3's model card publishes, computed again and compared.

Source: huggingface.co/BAAI/bge-m3, README.md, "Usage" ("Generate Embedding for text", "Compute score for text pairs").
They were computed in float16, hence the tolerance. Token ids and strings are those of XLM-RoBERTa's vocabulary, which
every checkpoint in this layout shares; the scores are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from m3cli.corpus.pairs import Pair
from m3cli.encoder.checkpoint import Checkpoint
from m3cli.jobs.score import ScoreRequest, finish_scores
from m3cli.jobs.score_texts import TextScorer
from m3cli.progress import Progress
from m3cli.retrieval.maxsim import score_sparse
from m3cli.retrieval.modes import modes_of, parts_of

TOLERANCE = 2e-3
WEIGHTS = (0.4, 0.2, 0.4)
SENTENCES_1 = ("What is BGE M3?", "Defination of BM25")
SENTENCES_2 = (
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document",
)
INPUT_IDS = (0, 4865, 83, 335, 11679, 276, 363, 32, 2)
"of the first sentence, as XLM-RoBERTa's tokenizer gives them"
LEXICAL_WEIGHTS: tuple[dict[str, float], ...] = (
    {"What": 0.08356, "is": 0.0814, "B": 0.1296, "GE": 0.252, "M": 0.1702, "3": 0.2695, "?": 0.04092},
    {"De": 0.05005, "fin": 0.1368, "ation": 0.04498, "of": 0.0633, "BM": 0.2515, "25": 0.3335},
)
SIMILARITY = (0.6265, 0.3477, 0.3499, 0.678)
LEXICAL_SCORES = (0.1955, 0.0)
"of the first pair, and between the two first sentences"
COLBERT_SCORES = (0.7797, 0.4620)
SCORES: dict[str, tuple[float, ...]] = {
    "dense": (0.6260, 0.3474, 0.3499, 0.6782),
    "sparse": (0.1956, 0.0088, 0.0, 0.1803),
    "colbert": (0.7796, 0.4621, 0.4524, 0.7899),
    "sparse+dense": (0.4825, 0.2345, 0.2332, 0.5122),
    "colbert+sparse+dense": (0.6014, 0.3256, 0.3209, 0.6233),
}

Status = Literal["pass", "fail", "not this model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One published figure and what it is here."""

    name: str
    published: float | str
    found: float | str | None
    "None: the checkpoint has no head for it"
    status: Status


def is_bge_m3(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint calls itself BAAI/bge-m3 and has its shape."""
    shape = (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.num_heads, checkpoint.vocab_size)
    named = any("bge-m3" in name.lower() for name in (checkpoint.name, *checkpoint.folder.absolute().parts))
    return named and shape == (24, 1024, 16, 250002) and checkpoint.num_positions == 8194


def recompute_card(checkpoint: Checkpoint, *, device: str | None = None) -> list[Figure]:
    """Compute the model card's figures with a checkpoint, in float32; only BAAI/bge-m3 can pass or fail its scores."""
    request = ScoreRequest(pairs="-", model=str(checkpoint.folder), dtype="float32", device=device)
    scorer = TextScorer(request, Progress("none"))
    scorer.load(scorer.outputs)
    judged = is_bge_m3(checkpoint)
    return [*_check_tokens(scorer), *_check_numbers(scorer, judged=judged)]


def _check_tokens(scorer: TextScorer) -> Iterator[Figure]:
    tokenised = scorer.tokenise(SENTENCES_1)
    ids = tuple(tokenised.input_ids[0].tolist())
    yield _text_figure(f"token ids of {SENTENCES_1[0]!r}", " ".join(map(str, INPUT_IDS)), " ".join(map(str, ids)))
    for sentence, weights, found in zip(SENTENCES_1, LEXICAL_WEIGHTS, tokenised.input_ids, strict=True):
        strings = [scorer.spell_token(token) for token in found[1:-1].tolist()]
        yield _text_figure(f"tokens of {sentence!r}", " ".join(weights), " ".join(strings))


def _check_numbers(scorer: TextScorer, *, judged: bool) -> Iterator[Figure]:
    pairs = [(query, passage) for query in SENTENCES_1 for passage in SENTENCES_2]
    window = [
        Pair(number=number, query=query, passage=passage, fault="", row={}, raw=b"", batch=None)
        for number, (query, passage) in enumerate(pairs, start=1)
    ]
    modes = modes_of(scorer.outputs)
    assert parts_of(modes) == tuple(scorer.outputs)
    scores, _ = finish_scores(scorer.score_window(window), modes, weights=WEIGHTS)
    for number, published in enumerate(SIMILARITY):
        yield _figure(f"dense similarity [{number // 2}][{number % 2}]", published, scores["dense"][number], judged)
    yield from _check_lexical(scorer, judged=judged)
    for number, published in enumerate(COLBERT_SCORES):
        found = scores["colbert"][number] if "colbert" in scores else None
        yield _figure(f"ColBERT score [0][{number}]", published, found, judged)
    for mode, values in SCORES.items():
        for number, published in enumerate(values):
            found = scores[mode][number] if mode in scores else None
            yield _figure(f"{mode} of pair {number + 1}", published, found, judged)


def _check_lexical(scorer: TextScorer, *, judged: bool) -> Iterator[Figure]:
    made, _ = scorer.encode_texts([*SENTENCES_1, *SENTENCES_2], max_length=512)
    lexical = made.lexical_weights
    for row, weights in enumerate(LEXICAL_WEIGHTS):
        found: dict[str, float] = {}
        if lexical is not None:
            span = slice(lexical.indptr[row], lexical.indptr[row + 1])
            strings = [scorer.spell_token(token) for token in lexical.indices[span].tolist()]
            found = dict(zip(strings, lexical.values[span].tolist(), strict=True))
        for token, published in weights.items():
            value = None if lexical is None else found.get(token, 0.0)
            yield _figure(f"lexical weight of {token!r} in {SENTENCES_1[row]!r}", published, value, judged)
    matches = [None, None]
    if lexical is not None:
        first, others = np.zeros(2, np.int64), np.array([2, 1])
        matches = score_sparse(lexical, lexical, first, others).tolist()
    for name, published, value in zip(("[0][0]", "between the first two"), LEXICAL_SCORES, matches, strict=True):
        yield _figure(f"lexical score {name}", published, value, judged)


def _figure(name: str, published: float, found: float | None, judged: bool) -> Figure:
    value = None if found is None else round(float(found), 5)
    good = value is not None and abs(value - published) <= TOLERANCE
    status: Status = ("pass" if good else "fail") if judged else "not this model"
    return Figure(name=name, published=published, found=value, status=status)


def _text_figure(name: str, published: str, found: str) -> Figure:
    return Figure(name=name, published=published, found=found, status="pass" if found == published else "fail")

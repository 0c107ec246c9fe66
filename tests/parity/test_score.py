"""`m3 score` against FlagEmbedding's `compute_score`, float32: every score within 1e-4.

The one known difference: the reference has no mask on the passage side, so that where a passage is padded in its batch
a query token's maximum is floored at 0. Golden values for the demo checkpoint are checked in every run; they were made
by scripts/make_golden.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3cli.corpus.pairs import Pair
from m3cli.encoder.checkpoint import read_checkpoint
from m3cli.encoder.encode import tokenise_texts
from m3cli.encoder.tokenizer import load_tokenizer
from m3cli.jobs.score.command import finish_scores
from m3cli.jobs.score.from_texts import TextScorer
from m3cli.progress import Progress
from m3cli.records import TokenMatrices
from m3cli.requests import ScoreRequest
from m3cli.retrieval.scores import MODES, parts_of, score_colbert

GOLDEN = json.loads((Path(__file__).parent / "golden_demo.json").read_text(encoding="utf-8"))
WEIGHTS = (0.4, 0.2, 0.4)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "狐狸",
    "Κόσμος",
    "мир",
    "日本語",
    "café",
    "3.14",
]


def score(model: Path, pairs: list[tuple[str, str]], **settings: Any) -> dict[str, np.ndarray]:
    request = ScoreRequest(pairs="-", model=str(model), dtype="float32", device="cpu", **settings)
    scorer = TextScorer(request, Progress("none"))
    scorer.load(parts_of(MODES))
    window = [
        Pair(number=number, query=query, passage=passage, fault="", row={}, raw=b"", batch=None)
        for number, (query, passage) in enumerate(pairs, start=1)
    ]
    return finish_scores(scorer.score_window(window), MODES, weights=WEIGHTS)[0]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    draw = random.Random(3)
    queries = [" ".join(draw.choices(WORDS, k=k)) for k in (1, 3, 8, 20)]
    passages = [" ".join(draw.choices(WORDS, k=k)) for k in (1, 2, 5, 13, 60, 200, 700)] + ["x", " trailing  "]
    both_sides = [(passages[1], queries[0]), (queries[0], queries[0])]
    return [(query, passage) for query in queries for passage in passages] + both_sides


def test_golden_token_ids(demo_m3: Path) -> None:
    tokenizer = load_tokenizer(read_checkpoint(demo_m3))
    made = tokenise_texts(GOLDEN["queries"] + GOLDEN["passages"], tokenizer, max_length=512)
    assert [ids.tolist() for ids in made.input_ids] == GOLDEN["input_ids"]


def test_golden_scores(demo_m3: Path) -> None:
    pairs = [(query, passage) for query in GOLDEN["queries"] for passage in GOLDEN["passages"]]
    made = score(demo_m3, pairs)
    assert list(made) == list(MODES)
    for mode in MODES:
        assert np.abs(made[mode] - GOLDEN["scores"][mode]).max() < 1e-4, mode


def reference_scores(
    model: Path, pairs: list[tuple[str, str]], *, pooling: str, one_by_one: bool
) -> dict[str, list[float]]:
    from FlagEmbedding import BGEM3FlagModel  # noqa: PLC0415  6 s, only where this runs

    reference = BGEM3FlagModel(
        str(model), use_fp16=False, devices="cpu", pooling_method=pooling, query_max_length=512, passage_max_length=512
    )
    settings = {"weights_for_different_modes": list(WEIGHTS), "batch_size": 1 if one_by_one else len(pairs)}
    scores: dict[str, list[float]] = reference.compute_score(pairs, **settings)
    return scores


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_random_checkpoint_pair_by_pair(tiny_m3: Path, pairs: list[tuple[str, str]]) -> None:
    expected = reference_scores(tiny_m3, pairs, pooling="cls", one_by_one=True)
    made = score(tiny_m3, pairs)
    for mode in MODES:
        assert np.abs(made[mode] - expected[mode]).max() < 1e-4, mode


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_demo_checkpoint_in_one_padded_batch(demo_m3: Path, pairs: list[tuple[str, str]]) -> None:
    expected = reference_scores(demo_m3, pairs, pooling="mean", one_by_one=False)
    made = score(demo_m3, pairs)
    for mode in MODES:
        assert np.abs(made[mode] - expected[mode]).max() < 1e-4, mode


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_known_difference_reference_is_0_at_least_where_the_passage_is_padded() -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import (  # noqa: PLC0415
        EncoderOnlyEmbedderM3Model,
    )

    queries = np.array([[1.0, 0.0]], np.float32)
    passage = np.array([[-1.0, 0.0]], np.float32)
    padded = np.concatenate([passage, np.zeros((1, 2), np.float32)])

    class Reference:
        temperature = 1.0

    def reference(vectors: np.ndarray) -> float:
        scores = EncoderOnlyEmbedderM3Model.compute_colbert_score(
            Reference(), torch.from_numpy(queries)[None], torch.from_numpy(vectors)[None], torch.ones(1, 2)
        )
        return float(scores[0, 0])

    one = np.zeros(1, np.int64)
    mine = score_colbert(
        TokenMatrices(indptr=np.array([0, 1]), vectors=queries),
        TokenMatrices(indptr=np.array([0, 1]), vectors=passage),
        one,
        one,
    )
    assert mine.tolist() == [-1.0]
    assert reference(passage) == -1.0
    assert reference(padded) == 0.0


def test_the_order_of_pairs_and_batches_changes_nothing(tiny_m3: Path, pairs: list[tuple[str, str]]) -> None:
    usual, other = score(tiny_m3, pairs), score(tiny_m3, pairs[::-1], max_batch_tokens=64)
    different = score(tiny_m3, pairs, max_query_length=511)  # no text is shared between the sides then
    for mode in MODES:
        assert np.abs(usual[mode] - other[mode][::-1]).max() < 1e-5
        assert np.abs(usual[mode] - different[mode]).max() < 1e-5

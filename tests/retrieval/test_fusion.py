"""One list of several: weights that are there, averages, reciprocal ranks."""

from __future__ import annotations

import numpy as np
import pytest

from m3cli.errors import UsageError
from m3cli.retrieval.scores import average_scores, combine_scores, fuse_ranks, resolve_weights


def test_weights_of_what_is_there() -> None:
    assert resolve_weights(None, ["dense", "sparse", "colbert"]) == (1, 1, 1)
    assert resolve_weights(None, ["dense", "colbert"]) == (1, 0, 1)
    assert resolve_weights((1, 0.3, 0), ["dense", "sparse"]) == (1, 0.3, 0)


def test_a_typed_weight_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="colbert 1, and the folder has no colbert, only dense, sparse"):
        resolve_weights((1, 1, 1), ["dense", "sparse"])


def test_one_output_is_no_hybrid() -> None:
    with pytest.raises(UsageError, match="only dense: use --mode dense"):
        resolve_weights(None, ["dense"])


def test_averages_are_those_of_score() -> None:
    random = np.random.default_rng(1)
    scores = {output: random.random(5, np.float32) for output in ("dense", "sparse", "colbert")}
    whole = combine_scores(scores, ["colbert+sparse+dense"], weights=(1, 0.3, 2))["colbert+sparse+dense"]  # type: ignore[arg-type]
    assert average_scores(scores, (1, 0.3, 2)) == pytest.approx(whole)  # type: ignore[arg-type]
    two = {output: scores[output] for output in ("dense", "sparse")}
    assert average_scores(two, (1, 3, 0)) == pytest.approx((scores["dense"] + 3 * scores["sparse"]) / 4)  # type: ignore[arg-type]


def test_reciprocal_ranks() -> None:
    ranks = {"dense": np.array([0, -1, 4]), "sparse": np.array([1, 0, -1]), "colbert": np.array([-1, -1, 2])}
    made = fuse_ranks(ranks, (1, 1, 2))  # type: ignore[arg-type]
    assert made == pytest.approx([1 / 61 + 1 / 62, 1 / 61, 1 / 65 + 2 / 63])

"""Weighted averages, and weights that there is nothing to divide by."""

from __future__ import annotations

import numpy as np
import pytest

from m3cli.errors import UsageError
from m3cli.records import Output
from m3cli.retrieval.scores import MODES, check_weights, combine_scores, modes_of, parts_of

SCORES: dict[Output, np.ndarray] = {
    "dense": np.array([0.6], np.float32),
    "sparse": np.array([0.2], np.float32),
    "colbert": np.array([0.8], np.float32),
}


def test_weighted_scores_are_averages() -> None:
    made = combine_scores(SCORES, MODES, weights=(0.4, 0.2, 0.8))
    assert made["sparse+dense"] == pytest.approx((0.4 * 0.6 + 0.2 * 0.2) / 0.6)
    assert made["colbert+sparse+dense"] == pytest.approx((0.4 * 0.6 + 0.2 * 0.2 + 0.8 * 0.8) / 1.4)
    assert all(values.dtype == np.float32 for values in made.values())


def test_parts_and_modes() -> None:
    assert parts_of(["sparse+dense"]) == ("dense", "sparse")
    assert parts_of(["colbert"]) == ("colbert",)
    assert modes_of(["dense", "sparse"]) == ("dense", "sparse", "sparse+dense")
    assert modes_of(["dense", "colbert"]) == ("dense", "colbert")
    assert modes_of(["dense", "sparse", "colbert"]) == MODES


def test_weights_must_leave_something_to_divide_by_in_each_mode() -> None:
    check_weights(("dense", "colbert"), (0.0, 0.0, 1.0))
    check_weights(("colbert+sparse+dense",), (0.0, 0.0, 1.0))
    with pytest.raises(UsageError, match=r"0,0,1.*sparse\+dense sum to 0"):
        check_weights(MODES, (0.0, 0.0, 1.0))

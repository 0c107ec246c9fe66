from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3cli.encoder.colbert import choose_vectors, keep_vectors
from m3cli.records import TokenMatrices


def as_matrices(rows: list[list[float]]) -> TokenMatrices:
    """One vector a weight; vector v is [v]."""
    weights = np.array([weight for row in rows for weight in row], np.float32)
    return TokenMatrices(
        indptr=np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64),
        vectors=np.arange(len(weights), dtype=np.float32)[:, None],
        scales=weights + 1,
        weights=weights,
    )


def test_what_is_kept_stays_in_its_row_with_all_that_belongs_to_it() -> None:
    matrices = as_matrices([[0.5, 0.1], [], [0.2, 0.3, 0.0]])
    kept = keep_vectors(matrices, np.array([True, False, False, True, True]))
    assert kept.indptr.tolist() == [0, 1, 1, 3]
    assert kept.vectors[:, 0].tolist() == [0, 3, 4]
    assert kept.weights is not None
    assert kept.scales is not None
    assert kept.weights.tolist() == np.array([0.5, 0.3, 0], np.float32).tolist()
    assert kept.scales.tolist() == np.array([1.5, 1.3, 1], np.float32).tolist()


def test_of_equal_weights_the_earlier_token_is_taken() -> None:
    assert choose_vectors(as_matrices([[0.2, 0.2, 0.2]]), top_k=2).tolist() == [True, True, False]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), max_size=9), max_size=6),
    st.integers(1, 5),
)
def test_chosen_as_a_loop_would(rows: list[list[float]], most: int) -> None:
    mask = choose_vectors(as_matrices(rows), top_k=most)
    expected: list[bool] = []
    for row in rows:
        weights = np.array(row, np.float32)
        order = sorted(range(len(row)), key=lambda place: (-weights[place], place))
        expected += [place in order[:most] for place in range(len(row))]
    assert mask.tolist() == expected

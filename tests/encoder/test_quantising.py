from __future__ import annotations

import numpy as np
import pytest

from m3cli.encoder.colbert import quantise_binary, quantise_int8
from m3cli.records import TokenMatrices
from m3cli.retrieval.scores import decode_vectors


def make(count: int, dim: int) -> np.ndarray:
    vectors = np.random.default_rng(3).standard_normal((count, dim)).astype(np.float32)
    made: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return made


def test_int8_vectors_have_norm_1_and_point_the_same_way() -> None:
    vectors = make(3000, 128)  # more than a block
    rounded, scales = quantise_int8(vectors)
    assert rounded.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.abs(rounded).max(axis=1).tolist() == [127] * 3000
    decoded = rounded * scales[:, None]
    assert np.linalg.norm(decoded, axis=1) == pytest.approx(np.ones(3000), abs=1e-6)
    assert np.einsum("ij,ij->i", decoded, vectors).min() > 0.9998


def test_a_vector_of_zeros_stays_one() -> None:
    rounded, scales = quantise_int8(np.zeros((1, 4), np.float32))
    assert not rounded.any()
    assert scales.tolist() == [0.0]


def test_signs_stand_in_the_order_that_vespa_unpacks() -> None:
    # The first of eight numbers is the highest bit: 1000 0001, 0100 0000.
    vectors = np.full((1, 16), -0.1, np.float32)
    vectors[0, [0, 7, 9]] = 0.1
    vectors[0, 8] = 0.0
    assert quantise_binary(vectors).tolist() == [[0x81, 0x40]]


@pytest.mark.parametrize("places", [slice(2, 5), np.array([4, 0])])
def test_what_is_stored_is_decoded_to_float32_of_norm_1(places: slice | np.ndarray) -> None:
    vectors, indptr = make(6, 64), np.array([0, 6])
    rounded, scales = quantise_int8(vectors)
    from_int8 = decode_vectors(TokenMatrices(indptr=indptr, vectors=rounded, scales=scales), places)
    from_signs = decode_vectors(TokenMatrices(indptr=indptr, vectors=quantise_binary(vectors)), places)
    from_half = decode_vectors(TokenMatrices(indptr=indptr, vectors=vectors.astype(np.float16)), places)
    assert from_int8 == pytest.approx(vectors[places], abs=2e-3)
    assert np.array_equal(from_signs, np.where(vectors[places] > 0, 0.125, -0.125))
    assert from_half == pytest.approx(vectors[places], abs=1e-3)
    assert {each.dtype for each in (from_int8, from_signs, from_half)} == {np.dtype(np.float32)}
